"""The recorded call: the teacher's rollout has to be what its own stock pipeline computes."""

import dataclasses

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from vivace.distill.actors import Actors
from vivace.distill.call import pack, unpack
from vivace.distill.conditioners import Setting, inputs_of
from vivace.distill.data.sample import Batch
from vivace.distill.objective import Start
from vivace.errors import InputError

STEPS = 4  # divides 1000: else DDIM steps past its own grid


def stock_latents(actors: Actors, batch: Batch, noise: torch.Tensor, *, guidance: float) -> torch.Tensor:
    """What the stock pipeline makes of this noise."""
    pipe = actors.pipe
    own = pipe.scheduler
    flow = isinstance(own, FlowMatchEulerDiscreteScheduler)
    setting = Setting(pipe, actors.encode, torch.Generator().manual_seed(0))
    arguments = inputs_of(actors.config.conditioners, batch, setting)
    if flow:
        arguments["sigmas"] = [1 - i / STEPS for i in range(STEPS)]
    else:
        clean = {"clip_sample": False, "timestep_spacing": "trailing", "set_alpha_to_one": True, "steps_offset": 0}
        pipe.scheduler = DDIMScheduler.from_config(own.config, **clean)
        arguments["num_inference_steps"] = STEPS
    if "mask_image" in arguments:
        # The masked picture's latents are sampled after the noise, which the stock pipeline is given here.
        arguments["generator"] = torch.Generator().manual_seed(0)
        torch.randn(noise.shape, generator=arguments["generator"])
    packed = actors.recorder.record(batch.captions, size=batch.size, **_only(actors, arguments)).packed
    quiet = {"use_resolution_binning": False, "clean_caption": False}
    quiet = {name: value for name, value in quiet.items() if name in actors.recorder.accepts}
    try:
        found = pipe(
            prompt=list(batch.captions),
            latents=pack(noise) if packed else noise,
            guidance_scale=guidance,
            height=64,
            width=64,
            output_type="latent",
            **arguments,
            **quiet,
        ).images
    finally:
        pipe.scheduler = own
    return unpack(found, height=8, width=8) if packed else found


def _only(actors: Actors, arguments: dict) -> dict:
    names = {one.argument for one in actors.config.conditioners}
    return {name: value for name, value in arguments.items() if name in names}


def test_the_rollout_is_the_stock_pipelines(actors, batch):
    item = actors.prepare(batch)
    noise = torch.randn(item.z.shape, generator=torch.Generator().manual_seed(5))
    objective = dataclasses.replace(actors.objective, config=dataclasses.replace(actors.config, solver="euler"))
    grid = objective.view.levels.grid(STEPS, tokens=objective.tokens(item.z))
    ours = objective.target(item, Start(noise, grid, 3.0), actors.student)
    with torch.no_grad():
        stock = stock_latents(actors, batch, noise, guidance=3.0)
    scale = stock.abs().max()
    assert (ours - stock).abs().max() < 2e-4 * scale
    unguided = objective.target(item, Start(noise, grid, 1.0), actors.student)
    assert (unguided - stock).abs().max() > 1e-3 * scale


def test_guidance_is_in_two_halves_or_embedded(actors, batch):
    call = actors.prepare(batch).call
    assert call.halves or call.kwargs["guidance"] is not None
    if call.halves:
        whole, half = call.kwargs["encoder_hidden_states"], call.guided_half().kwargs["encoder_hidden_states"]
        assert torch.equal(whole[2:], half)
        assert not torch.equal(whole[:2], half)


def test_recording_leaves_no_hook_and_no_state(actors_of, batch):
    actors = actors_of("sd3")
    first, second = (actors.prepare(batch) for _ in range(2))
    assert not actors.teacher._forward_pre_hooks
    assert torch.equal(first.call.kwargs["encoder_hidden_states"], second.call.kwargs["encoder_hidden_states"])


def test_what_the_pipeline_refuses_is_said(actors_of):
    actors = actors_of("sd3")
    with pytest.raises(InputError, match="StableDiffusion3Pipeline refused"):
        actors.recorder.record(["a"], size=(60, 60))


def test_packing_is_fluxs_own():
    from diffusers import FluxPipeline

    x = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).view(2, 3, 4, 6)
    packed = pack(x)
    assert torch.equal(packed, FluxPipeline._pack_latents(x, 2, 3, 4, 6))
    assert torch.equal(unpack(packed, height=4, width=6), x)
