"""The order of the passes and the report of what they did, on every kind of family."""

import json

import pytest
import torch
from torch.utils._pytree import tree_leaves

import vivace
from vivace import Config
from vivace.families import FAMILIES
from vivace.fused import FUSED
from vivace.passes import PASSES


def test_one_order_each_place_with_its_reason():
    names = [one.name for one in PASSES]
    first, last = (
        ["attention", "lora", "channels_last", "vae", "quant", "encoders", "prompts", "vram"],
        ["fuse", "compile", "cache", "accumulate", "graphs"],
    )
    assert names == first + last
    assert all(one.why_here for one in PASSES)
    assert set(names) <= set(Config.__dataclass_fields__)


def tensors(output) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_on_every_family(family):
    pipe = FAMILIES[family].tiny()
    name = FAMILIES[family].denoisers[0]
    denoiser = getattr(pipe, name)
    words = min(8, FAMILIES[family].variant().text_tokens)  # Stable Video Diffusion has one, its picture
    arguments = FAMILIES[family].inputs(denoiser, size=(64, 64), batch=1, frames=1, text_tokens=words, seed=0)
    with torch.no_grad():
        stock = tensors(denoiser(**arguments))
        vivace.accelerate(pipe)
        fast = tensors(denoiser(**arguments))
        report = vivace.report(pipe)
        vivace.restore(pipe)
        torch.testing.assert_close(fast, stock, rtol=1e-3, atol=1e-4)
        assert all(map(torch.equal, tensors(denoiser(**arguments)), stock))
    assert report.family == family
    assert set(report.calls[name]) == {"fused blocks" if family in FUSED else "stock blocks"}
    assert [note.name for note in report.passes] == [one.name for one in PASSES]
    assert json.loads(json.dumps(report.to_dict()))["calls"][name]
    assert all(note.name in str(report) for note in report.passes)
