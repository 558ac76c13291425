"""Which denoisers graphs are for, by rule; and recordings of one model that take turns."""

import importlib.util
import subprocess
import sys

import pytest

from vivace.config import Config
from vivace.families import FAMILIES
from vivace.passes.graphs import wanted, wins
from vivace.passes.target import Target


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("sd", True),
        ("sdxl", True),
        ("svd", True),
        ("sd3", True),
        ("flux", True),
        ("qwen_image", True),
        ("wan", False),
    ],
)
def test_images_and_unets(family, expected):
    denoiser, media = FAMILIES[family].full(device="meta"), FAMILIES[family].media
    assert wins(denoiser, media=media, sm=(9, 0), quantised=False) is expected
    assert wins(denoiser, media=media, sm=(9, 0), quantised=True)


def test_tiny_ones_of_every_kind():
    assert wins(FAMILIES["sd3"].tiny().transformer, media=None, sm=(7, 5), quantised=False)


@pytest.mark.parametrize(
    ("family", "fields", "expected"),
    [
        ("flux", {}, True),
        ("flux", {"graphs": "off"}, False),
        ("sdxl", {}, True),
        ("wan", {}, False),
        ("wan", {"graphs": "on"}, True),
    ],
)
def test_the_rule_holds_unless_graphs_are_asked_for_or_refused(family, fields, expected):
    one = FAMILIES[family]
    denoiser = one.full(device="meta")
    target = Target(subject=denoiser, family=one, config=Config(**fields), denoisers={one.denoisers[0]: denoiser})
    assert wanted(target) is expected


TURNS = """
import torch, vivace
pipe = vivace.load("builtin", device="cuda")
pipe.set_progress_bar_config(disable=True)
def draw():
    made = [torch.Generator().manual_seed(i) for i in range(BATCH)]
    return pipe(["a red circle left of a blue square"] * BATCH, generator=made, num_inference_steps=12,
                guidance_scale=3.0, output_type="pt").images.float()
drawn = {}
for graphs in ("off", "on"):
    vivace.accelerate(pipe, graphs=graphs, **FIELDS)
    drawn[graphs] = [draw() for _ in range(2)]
    torch.cuda.synchronize()
    vivace.restore(pipe)
far = max((a - b).abs().max().item() for a, b in zip(*drawn.values()))
assert far < 1e-2, far
"""


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("cudnn") is None, reason="needs nvidia-cudnn-frontend")
@pytest.mark.parametrize("quant", ["off", "fp8"])
@pytest.mark.parametrize("batch", [1, 50])
def test_exact_ends_and_the_middle_take_turns(quant, batch):
    """Two recordings in one pool, of a model too small for any attention in fp8: they draw what no recording draws.

    In a process of its own, for a fault of the device ends it.
    """
    fields = {"quant": quant, "attention": "cudnn_fp8", "exact_ends": 2}
    code = TURNS.replace("BATCH", str(batch)).replace("FIELDS", repr(fields))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
