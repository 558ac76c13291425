"""What every family's fused blocks owe those around them: callers, the cache and the graphs."""

from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_leaves

from vivace.attention.native import NATIVE
from vivace.families import FAMILIES
from vivace.fused import FUSED, fused_of
from vivace.fused.stack import Stack


def called(name, **options):
    """A tiny denoiser of the family, and the arguments of a call."""
    family = FAMILIES[name]
    denoiser = getattr(family.tiny(), family.denoisers[0]).eval()
    sizes = {"size": (64, 64), "batch": 2, "frames": 1, "text_tokens": min(7, family.variant().text_tokens)}
    return denoiser, family.inputs(denoiser, **sizes, seed=0) | options


def check_alike(ours, theirs):
    for one, other in zip(tree_leaves(ours), tree_leaves(theirs), strict=True):
        assert (one - other).norm() < 1e-3 * other.norm()


@pytest.mark.parametrize("name", FUSED)
def test_a_state_can_be_recorded_and_compared_with_what_comes_after(name):
    """Graphs flatten a state into tensors and hashable values; caches keep it, so no block may write into it."""
    denoiser, arguments = called(name)
    with ExitStack() as undo, torch.no_grad():
        split = fused_of(FAMILIES[name]).fuse(denoiser, attend=NATIVE.attend, undo=undo)
        state = split.ready(split.prologue(**arguments, once=split.prepare(arguments)), 0, None)
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
    denoiser, arguments = called(name, return_dict=True)
    with ExitStack() as undo, torch.no_grad():
        stock = denoiser(**arguments)
        fused = fused_of(FAMILIES[name]).fuse(denoiser, attend=NATIVE.attend, undo=undo)(**arguments)
    assert type(fused) is type(stock)
    check_alike(fused.sample, stock.sample)


@pytest.mark.parametrize("name", FUSED)
def test_weights_stay_the_denoisers_own_and_come_back(name):
    denoiser, arguments = called(name)
    with ExitStack() as undo, torch.no_grad():
        fused = fused_of(FAMILIES[name]).fuse(denoiser, attend=NATIVE.attend, undo=undo)
        for parameter in denoiser.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
        edited = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
        check_alike(fused(**arguments)[0], denoiser(**arguments)[0])
    for key, tensor in denoiser.state_dict().items():
        assert torch.equal(tensor, edited[key])
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, key


def counted(monkeypatch) -> list[int]:
    """The columns of every product that a stack computes from now on."""
    columns, call = [], Stack.__call__
    monkeypatch.setattr(Stack, "__call__", lambda self, x: (out := call(self, x), columns.append(out.shape[-1]))[0])
    return columns


@pytest.mark.parametrize("name", ["flux", "sd3", "qwen_image"])
def test_modulation_is_made_for_the_blocks_that_run_and_gives_the_same(name, monkeypatch):
    denoiser, arguments = called(name)
    with ExitStack() as undo, torch.no_grad():
        split = fused_of(FAMILIES[name]).fuse(denoiser, attend=NATIVE.attend, undo=undo)
        arguments["once"] = split.prepare(arguments)
        columns = counted(monkeypatch)
        exact = split(**arguments)[0]
        whole = max(columns)
        assert sum(count == whole for count in columns) == 1
        columns.clear()
        state = split.ready(split.prologue(**arguments), 0, 1)
        (first,) = columns
        assert first < whole
        columns.clear()
        split.epilogue(split.through(state, 0, 1))
        assert whole not in columns
        assert first not in columns
        front = split.ready(split.prologue(**arguments), 0, 1)
        for stops in ((0, None), (0, 1, None), (0, 1, 2, None)):
            state = front
            for first, last in pairwise(stops):
                # As segments do: what was made ready for some blocks does not go on to others.
                state = replace(split.through(state, first, last), context=front.context)
            torch.testing.assert_close(split.epilogue(state)[0], exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in FUSED if FAMILIES[name].signal])
def test_what_teacache_watches_is_what_it_watches_on_stock_blocks(name):
    family, (denoiser, arguments) = FAMILIES[name], called(name)
    with ExitStack() as undo, torch.no_grad():
        stock = family.signal(denoiser, family.split(denoiser).prologue(**arguments))
        split = fused_of(family).fuse(denoiser, attend=NATIVE.attend, undo=undo)
        state = split.ready(split.prologue(**arguments, once=split.prepare(arguments)), 0, 1)
        torch.testing.assert_close(split.signal(state), stock, rtol=1e-5, atol=1e-5)
