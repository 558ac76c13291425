"""The pipeline or denoiser of a workload, and its one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vivace.bench.workload import Workload
from vivace.families.unet import residuals

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

LARGEST = 2048**2
"""Pixels of a picture that a language model is shown, which the tiny pipeline's processor shrinks to a few."""
PROMPT = "a frog holding a sign, high quality, detailed, cinematic, soft light"


def build(workload: Workload) -> Any:
    """The pipeline to call end to end, or the bare denoiser, on the workload's device and in its type."""
    import torch

    dtype: torch.dtype = getattr(torch, workload.dtype)
    family = workload.facts
    if workload.model:
        from vivace.load import load

        pipe = load(workload.model, dtype=dtype, device=workload.device)
    elif workload.tiny:
        pipe = family.tiny(workload.pipeline).to(workload.device, dtype)
    elif workload.end_to_end:
        pipe = full_pipeline(workload)
    else:
        return family.full(workload.variant, device=workload.device, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe if workload.end_to_end else getattr(pipe, family.denoisers[0])


def full_pipeline(workload: Workload) -> DiffusionPipeline:
    """A pipeline at true size with random weights; its tokenizers are the tiny pipeline's."""
    import diffusers
    import torch

    from vivace.families.tokenizers import t5_tokenizer

    family, variant = workload.facts, workload.published
    small = family.tiny(workload.pipeline)
    slots = [*family.denoisers[: variant.experts], "vae", *family.text_encoders, *variant.text_encoders]
    parts = dict(small.components)
    if variant.experts > 1:
        # A picture's pipeline has one expert when it is tiny.
        parts["boundary_ratio"] = small.config["boundary_ratio"] or family.tiny().config["boundary_ratio"]
    dtype = getattr(torch, workload.dtype)
    for slot, part in parts.items():
        if slot in slots:
            parts[slot] = family.full(workload.variant, component=slot, device=workload.device, dtype=dtype)
        elif isinstance(part, torch.nn.Module):
            parts[slot] = None  # what the published model lacks: an image encoder for adapters, a second expert
    if workload.control:
        beside: Any = diffusers.ControlNetModel
        with torch.device(workload.device):
            parts["controlnet"] = beside.from_unet(parts["unet"]).to(dtype=dtype)
    _let_read(parts, small)
    # The tiny Stable Diffusion 3 goes without its largest text encoder.
    for slot in {"tokenizer_3"} & parts.keys():
        parts[slot] = t5_tokenizer()
    kind, config = family.scheduler
    if kind:
        parts["scheduler"] = getattr(diffusers, kind)(**{**config, **variant.scheduler})
    return type(small)(**parts)


def _let_read(parts: dict[str, Any], small: Any) -> None:
    """What turns pictures and words into numbers is the tiny pipeline's; let the large models understand it."""
    from vivace.families.tokenizers import clip_image_processor

    seeing = parts.get("image_encoder")
    for slot in ("image_processor", "feature_extractor"):
        if seeing is not None and parts.get(slot) is not None:
            parts[slot] = clip_image_processor(size=seeing.config.image_size)
    if "processor" in parts:
        told = small.text_encoder.config.to_dict()
        for name in (name for name in told if name.endswith("_token_id")):
            setattr(parts["text_encoder"].config, name, told[name])
        images, vision = parts["processor"].image_processor, parts["text_encoder"].config.vision_config
        images.patch_size = vision.patch_size
        images.size.longest_edge = LARGEST


def call_of(subject: Any, workload: Workload) -> Callable[[], Any]:
    """One call of what `build` made; every call has the same inputs, and they are the same in every process."""
    if not workload.end_to_end:
        arguments = inputs_of(subject, workload)
        return lambda: subject(**arguments)
    arguments = _pipeline_arguments(subject, workload)

    def call() -> Any:
        import torch

        output = subject(**arguments, generator=torch.Generator("cpu").manual_seed(0), output_type="pt")
        return output.frames if hasattr(output, "frames") else output.images

    return call


def inputs_of(denoiser: Any, workload: Workload) -> dict[str, Any]:
    """The keyword arguments of one forward, drawn in the workload's type and moved to the denoiser's.

    A denoiser that was widened to float32 thus sees the same numbers as one in 16 bit.
    """
    import torch
    from torch.utils._pytree import tree_map_only

    drawn = getattr(torch, workload.dtype)
    shape = {name: getattr(workload, name) for name in ("size", "batch", "frames", "text_tokens")}
    stand = Stand(denoiser, device=torch.device(workload.device), dtype=drawn)
    inputs = workload.facts.inputs(stand, **shape, seed=0)
    if workload.control:
        inputs |= residuals(stand, size=workload.size, batch=workload.batch, seed=0)
    return tree_map_only(
        torch.Tensor, lambda x: x.to(denoiser.device, denoiser.dtype if x.dtype == drawn else None), inputs
    )


class Stand:
    """A denoiser as `Family.inputs` reads it, with another device and type."""

    def __init__(self, denoiser: Any, *, device: torch.device, dtype: torch.dtype) -> None:
        self._denoiser, self.device, self.dtype = denoiser, device, dtype

    def __getattr__(self, name: str) -> Any:
        return getattr(self._denoiser, name)


def _pipeline_arguments(pipe: Any, workload: Workload) -> dict[str, Any]:
    from PIL import Image

    from vivace.inputs import arguments, control_argument, size_arguments

    accepted = arguments(type(pipe))
    wanted = {
        "prompt": PROMPT,
        "num_frames": workload.frames,
        "num_inference_steps": workload.steps,
        "guidance_scale": workload.guidance,
        # PixArt's knows the shapes that its published models were trained on, and no tiny one's.
        "use_resolution_binning": not workload.tiny,
        **size_arguments(workload.size, accepted),
    }
    if "true_cfg_scale" in accepted and workload.facts.guidance == "two_calls":
        # Without a negative prompt these leave guidance out.
        wanted |= {"true_cfg_scale": workload.guidance, "negative_prompt": " ", "guidance_scale": None}
    names = {"image": "image", "mask": "mask_image", "control": control_argument(type(pipe))}
    for kind in _pictures(type(pipe), workload):
        wanted[str(names[kind])] = Image.new("L" if kind == "mask" else "RGB", workload.size, "gray")
    return {name: value for name, value in wanted.items() if name in accepted}


def _pictures(pipeline: type, workload: Workload) -> set[str]:
    """Which pictures a call has: what its class needs, and what it takes and its family's first class does not."""
    import diffusers

    from vivace.inputs import arguments, inputs_of

    taken = set(inputs_of(pipeline)) - {"video"}
    image = arguments(pipeline).get("image")
    needed = {"image"} if image is not None and image.default is image.empty else set()
    return (taken & needed) | (taken - inputs_of(getattr(diffusers, workload.facts.pipelines[0])))
