"""Where a tiny pipeline's seconds go: stock, accelerated, compiled."""

import pytest
import torch

from vivace.accelerate import accelerate
from vivace.bench.parts import parts_of
from vivace.families import FAMILIES


@pytest.mark.parametrize("ours", [False, True])
def test_every_part_has_its_share_and_the_pipeline_is_as_it_was(ours):
    pipe = FAMILIES["sd"].tiny()
    pipe.set_progress_bar_config(disable=True)
    if ours:
        accelerate(pipe, prompts="off")
    before = {name: dict(vars(part)) for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    found = parts_of(lambda: pipe("a frog", width=64, height=64, num_inference_steps=3), pipe)
    assert {"text_encoder", "unet", "vae", "between"} == set(found)
    assert all(part["seconds"] > 0 for name, part in found.items())
    assert sum(part["share"] for part in found.values()) == pytest.approx(1, abs=1e-3)
    assert found["unet"]["share"] > found["text_encoder"]["share"]
    for name, kept in before.items():
        assert vars(pipe.components[name]).get("forward") is kept.get("forward")
        assert vars(pipe.components[name]).get("decode") is kept.get("decode")


def test_a_compiled_pipeline_is_timed_as_it_was_compiled():
    traced = []

    def backend(graph, inputs):
        traced.append(graph)
        return graph.forward

    pipe = FAMILIES["sd"].tiny()
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.compile(fullgraph=True, backend=backend)
    pipe.vae.decoder.compile(fullgraph=True, backend=backend)
    compiled = pipe.unet._compiled_call_impl

    def call():
        pipe("a frog", width=64, height=64, num_inference_steps=2)

    with torch.no_grad():
        call()
        before = len(traced)
        found = parts_of(call, pipe)
    assert found["unet"]["share"] > found["text_encoder"]["share"] > 0
    assert found["vae"]["seconds"] > 0
    assert len(traced) == before >= 2
    assert pipe.unet._compiled_call_impl is compiled
