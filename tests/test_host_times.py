"""Schedulers step as stock to the bit, and in no step anything waits for the device."""

import diffusers
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vivace
from vivace.families import FAMILIES
from vivace.host_times import Times, keeping_times
from vivace.one_off import give_class

SCHEDULERS = {
    "sd": (
        "DDIMScheduler",
        "DDPMScheduler",
        "PNDMScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "DEISMultistepScheduler",
        "UniPCMultistepScheduler",
        "LCMScheduler",
        "TCDScheduler",
    ),
    "sd3": ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
}
CASES = [(family, name) for family, names in SCHEDULERS.items() for name in names]

READS = ("_local_scalar_dense", "nonzero", "index.Tensor")


class DeviceReads(TorchDispatchMode):
    """Reads of what stands for the device's memory: the pipeline's timesteps, and what is computed from them."""

    def __init__(self, pipe, monkeypatch):
        super().__init__()
        self.seen, self._theirs, self._held, self._few = [], set(), [], 0
        stock = pipe.progress_bar

        def progress_bar(*args, **kwargs):
            # The loop begins.
            self._theirs = {pipe.scheduler.timesteps.untyped_storage().data_ptr()}
            self._few = len(pipe.scheduler.timesteps)
            return stock(*args, **kwargs)

        monkeypatch.setattr(pipe, "progress_bar", progress_bar)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        theirs = self._theirs & {t.untyped_storage().data_ptr() for t in inputs}
        out = func(*args, **(kwargs or {}))
        if theirs and any(name in str(func) for name in READS):
            self.seen.append(str(func))
        elif theirs and isinstance(out, torch.Tensor) and out.numel() <= self._few:
            self._theirs.add(out.untyped_storage().data_ptr())
            self._held.append(out)  # an address must not come again
        return out


def latents(pipe, scheduler, **options):
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    return pipe(
        "a fox",
        **{"num_inference_steps": 4, "height": 64, "width": 64, "output_type": "latent"},
        **{"generator": torch.Generator().manual_seed(0), **options},
    ).images


@pytest.mark.parametrize(("family", "scheduler"), CASES)
def test_bit_equal_without_reads(family, scheduler, monkeypatch):
    pipe = FAMILIES[family].tiny()
    pipe.set_progress_bar_config(disable=True)
    stock = latents(pipe, scheduler)
    vivace.accelerate(pipe, fuse="off")
    with DeviceReads(pipe, monkeypatch) as reads:
        assert torch.equal(latents(pipe, scheduler), stock)
    assert reads.seen == []
    vivace.restore(pipe)
    assert type(pipe.scheduler) is getattr(diffusers, scheduler)


def test_stock_reads(monkeypatch):
    """The test above can fail: what it counts is there in a stock pipeline."""
    pipe = FAMILIES["sd"].tiny()
    pipe.set_progress_bar_config(disable=True)
    with DeviceReads(pipe, monkeypatch) as reads:
        latents(pipe, "DDIMScheduler")
    assert len(reads.seen) >= 4


def test_image_to_image_starts_late():
    from PIL import Image

    pipe = FAMILIES["sd"].tiny("StableDiffusionImg2ImgPipeline")
    pipe.set_progress_bar_config(disable=True)

    def picture():
        generator = torch.Generator().manual_seed(0)
        image = Image.new("RGB", (64, 64), "gray")
        return pipe(
            "a fox", image=image, num_inference_steps=6, strength=0.5, generator=generator, output_type="pt"
        ).images

    stock = picture()
    vivace.accelerate(pipe, fuse="off", vae="off")
    assert torch.equal(picture(), stock)
    vivace.restore(pipe)


def test_an_element_is_found_by_its_place():
    times = Times(torch.tensor([9.0, 5.0, 5.0, 1.0]))
    found = [times.find(t) for t in times.timesteps[1:]]
    assert [t.item() for t in found] == [5.0, 5.0, 1.0]
    assert all(t.untyped_storage().data_ptr() == times.host.untyped_storage().data_ptr() for t in found)
    for other in (5.0, torch.tensor(5.0), times.timesteps[:1], times.timesteps.int()[0], torch.tensor(5)):
        assert times.find(other) is None


def test_a_list_of_ones_own_goes_the_stock_way():
    scheduler = diffusers.EulerDiscreteScheduler()
    undo = give_class(scheduler, keeping_times(type(scheduler)))
    scheduler.set_timesteps(4)
    scheduler.timesteps = scheduler.timesteps[1:].clone()
    x = torch.ones(1, 4, 2, 2)
    assert scheduler.scale_model_input(x, scheduler.timesteps[0]).shape == x.shape
    undo()
    assert type(scheduler) is diffusers.EulerDiscreteScheduler


# Not for their timesteps: their noise levels live where their arithmetic does not.
WAITING = {
    "UniPCMultistepScheduler": "copies two noise levels to the device in every step",
    "FlowMatchHeunDiscreteScheduler": "compares a noise level on the device with its churn's limits",
}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("family", "scheduler"),
    [
        pytest.param(
            *case, marks=[pytest.mark.xfail(reason=WAITING[case[1]], strict=True)] if case[1] in WAITING else []
        )
        for case in CASES
    ],
)
def test_nothing_waits_on_a_gpu(family, scheduler):
    pipe = FAMILIES[family].tiny().to("cuda")
    pipe.set_progress_bar_config(disable=True)
    vivace.accelerate(pipe)
    # Noise of a generator on the host would be a copy to the device in every step.
    drawn = {"generator": torch.Generator("cuda").manual_seed(0)}
    latents(pipe, scheduler, **drawn)

    def strict(pipe, step, t, given):
        torch.cuda.set_sync_debug_mode("error" if step < 2 else "default")
        return given

    try:
        latents(pipe, scheduler, callback_on_step_end=strict, **drawn)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        vivace.restore(pipe)
