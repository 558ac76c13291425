"""What every family's fused blocks owe those around them: callers, the cache and the graphs."""

from contextlib import ExitStack

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_leaves

from vivace.attention.native import NATIVE
from vivace.families import FAMILIES
from vivace.fused import FUSED, fused_of


@pytest.mark.parametrize("name", FUSED)
def test_a_state_can_be_recorded_and_compared_with_what_comes_after(name):
    """Graphs flatten a state into tensors and hashable values; caches keep it, so no block may write into it."""
    family = FAMILIES[name]
    denoiser = getattr(family.tiny(), family.denoisers[0]).eval()
    arguments = family.inputs(denoiser, size=(64, 64), batch=2, frames=1, text_tokens=7, seed=0)
    with ExitStack() as undo, torch.no_grad():
        split = fused_of(family).fuse(denoiser, attend=NATIVE.attend, undo=undo)
        state = split.prologue(**arguments, once=split.prepare(arguments))
        for block in split.blocks:
            leaves, spec = tree_flatten(vars(state))
            hash((spec, *(leaf for leaf in leaves if not isinstance(leaf, torch.Tensor))))
            # What is computed ahead is for the next block alone.
            held = tree_leaves([state.x, state.text, state.skips, state.context])
            before = [(leaf, leaf._version) for leaf in held if isinstance(leaf, torch.Tensor)]
            state = block.forward(state)
            assert all(tensor._version == version for tensor, version in before), block.name


@pytest.mark.parametrize("name", FUSED)
def test_a_call_gets_the_object_that_stock_gives(name):
    family = FAMILIES[name]
    denoiser = getattr(family.tiny(), family.denoisers[0]).eval()
    tokens = min(7, family.variant().text_tokens)
    arguments = family.inputs(denoiser, size=(64, 64), batch=2, frames=1, text_tokens=tokens, seed=0)
    with ExitStack() as undo, torch.no_grad():
        stock = denoiser(**arguments | {"return_dict": True})
        fused = fused_of(family).fuse(denoiser, attend=NATIVE.attend, undo=undo)(**arguments | {"return_dict": True})
    assert type(fused) is type(stock)
    for ours, theirs in zip(tree_leaves(fused.sample), tree_leaves(stock.sample), strict=True):
        assert (ours - theirs).norm() < 1e-3 * theirs.norm()
