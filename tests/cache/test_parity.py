"""Beside diffusers' own hooks: the same decisions and the same outputs for the same inputs."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)

import vivace
from vivace import request
from vivace.families import FAMILIES

STEPS = 14


def path(denoiser: Any, *, family: str) -> list[dict[str, Any]]:
    """The arguments of a run in which the latents move smoothly, faster at the ends."""
    one = FAMILIES[family]
    frames = {"frames": 5} if one.media == "video" else {}
    given = one.inputs(denoiser, size=(64, 64), batch=1, **frames)
    other = torch.randn(given["hidden_states"].shape, generator=torch.Generator().manual_seed(7))
    arguments = []
    for step in range(STEPS):
        place = step / (STEPS - 1)
        x = given["hidden_states"] * (1 - place**2) + other * place**3
        arguments.append({**given, "hidden_states": x, "timestep": given["timestep"] * 2 * (1 - 0.9 * place)})
    return arguments


@torch.no_grad()
def theirs(denoiser: Any, config: Any, *, family: str, watch: str) -> tuple[list[torch.Tensor], list[int]]:
    """The outputs with diffusers' cache, and the steps at which the module `watch` ran."""
    denoiser = copy.deepcopy(denoiser)
    ran: list[int] = []
    now = {"step": 0}
    denoiser.get_submodule(watch).register_forward_pre_hook(lambda *_: ran.append(now["step"]))
    denoiser.enable_cache(config(now) if isinstance(config, Callable) else config)
    outputs = []
    for now["step"], arguments in enumerate(path(denoiser, family=family)):
        with denoiser.cache_context("cond"):
            outputs.append(denoiser(**arguments)[0])
    return outputs, ran


@torch.no_grad()
def ours(denoiser: Any, spelled: str, *, family: str, watch: str) -> tuple[list[torch.Tensor], list[int]]:
    denoiser = copy.deepcopy(denoiser)
    ran: list[int] = []
    vivace.accelerate(denoiser, cache=spelled, fuse="off")
    arguments = path(denoiser, family=family)
    with request.open_request(times=[float(one["timestep"].flatten()[0]) for one in arguments]) as now:
        denoiser.get_submodule(watch).register_forward_pre_hook(lambda *_: ran.append(now.step))
        outputs = []
        for now.step, given in enumerate(arguments):
            outputs.append(denoiser(**given)[0])
    return outputs, ran


def assert_same(
    a: tuple[list[torch.Tensor], list[int]], b: tuple[list[torch.Tensor], list[int]], skipped: range
) -> None:
    assert a[1] == b[1]
    assert STEPS - len(a[1]) in skipped
    for step, (x, y) in enumerate(zip(a[0], b[0], strict=True)):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5, msg=lambda text, step=step: f"step {step}: {text}")


# Hooks stand around the blocks: what is inside shows whether a block ran.
INNER = {"flux": "norm1", "wan": "norm1", "qwen_image": "img_norm1"}
SOME = range(2, STEPS - 1)


@pytest.mark.parametrize("family", ["flux", "wan", "qwen_image"])
@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5])
def test_first_block(family, threshold):
    one = FAMILIES[family]
    denoiser, watch = one.tiny().transformer, f"{one.blocks[0]}.1.{INNER[family]}"
    given = {"family": family, "watch": watch}
    expected = theirs(denoiser, FirstBlockCacheConfig(threshold=threshold), **given)
    assert_same(ours(denoiser, f"firstblock:threshold={threshold}", **given), expected, range(STEPS))


def test_first_block_skips_some():
    """So that the agreement above is about something."""
    denoiser = FAMILIES["qwen_image"].tiny().transformer
    watch = "transformer_blocks.1.img_norm1"
    _, ran = ours(denoiser, "firstblock:threshold=0.4", family="qwen_image", watch=watch)
    assert STEPS - len(ran) in SOME


@pytest.mark.parametrize("family", ["wan", "flux"])
@pytest.mark.parametrize(("threshold", "skips"), [(0.06, 3), (0.3, 2), (1.0, 5)])
def test_mag_cache(family, threshold, skips):
    one = FAMILIES[family]
    denoiser = one.tiny().transformer
    ratios = [1.0, 1.2, 1.1, 1.05, 1.03, 1.02, 1.02, 1.0, 1.0, 0.99, 0.98, 0.97, 0.95, 0.9, 0.8]
    config = MagCacheConfig(
        threshold=threshold, max_skip_steps=skips, retention_ratio=0.2, num_inference_steps=STEPS, mag_ratios=ratios
    )
    spelled = f"magcache:threshold={threshold},max_skips={skips},ratios=" + "+".join(map(str, ratios))
    given = {"family": family, "watch": f"{one.blocks[0]}.1.{INNER[family]}"}
    assert_same(ours(denoiser, spelled, **given), theirs(denoiser, config, **given), SOME)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("interval", "warmup", "after"), [(5, 3, None), (3, 4, 11), (2, 2, None)])
def test_taylorseer_in_its_lite_mode(order, interval, warmup, after):
    denoiser = FAMILIES["flux"].tiny().transformer
    config = TaylorSeerCacheConfig(
        cache_interval=interval, disable_cache_before_step=warmup, disable_cache_after_step=after, max_order=order,
        taylor_factors_dtype=torch.float32, use_lite_mode=True,
    )  # fmt: skip
    cooldown = 0 if after is None else STEPS - after
    spelled = f"taylorseer:interval={interval},warmup={warmup},cooldown={cooldown},order={order}"
    given = {"family": "flux", "watch": "transformer_blocks.1.norm1"}
    assert_same(ours(denoiser, spelled, **given), theirs(denoiser, config, **given), SOME)


@pytest.mark.parametrize(
    ("family", "watch"), [("flux", "transformer_blocks.0.attn.to_q"), ("wan", "blocks.0.attn1.to_q")]
)
@pytest.mark.parametrize("every", [2, 3])
def test_pyramid_attention_broadcast(family, watch, every):
    denoiser = FAMILIES[family].tiny().transformer

    def config(now):
        return PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=every, cross_attention_block_skip_range=every + 1,
            spatial_attention_timestep_skip_range=(0, 99), cross_attention_timestep_skip_range=(0, 99),
            spatial_attention_block_identifiers=("blocks",), cross_attention_block_identifiers=("blocks",),
            current_timestep_callback=lambda: now["step"] + 1,
        )  # fmt: skip

    spelled = f"pab:warmup=0,cooldown=0,self_every={every},cross_every={every + 1}"
    given = {"family": family, "watch": watch}
    assert_same(ours(denoiser, spelled, **given), theirs(denoiser, config, **given), SOME)
