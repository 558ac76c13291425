"""A picture job: what `generate` is asked for, and the checks that need no model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from vivace import checkpoint
from vivace.config import Config
from vivace.errors import InputError
from vivace.load import Source

LARGEST_SIDE = 16384  # pixels
SEEDS = 2**63
# Field of a Job -> the least and the most it can be.
BOUNDS = {
    "steps": (1, 10_000),
    "count": (1, 1_000_000),
    "frames": (1, 10_000),
    "fps": (1, 1_000),
    "guidance": (0, 1_000),
    "true_cfg": (0, 1_000),
    "seed": (0, SEEDS - 1),
    "controlnet_scale": (0, 1_000),
}
# Argument of a pipeline's call -> the field of a Job that says the same; `--call-kwargs` is for all others.
FIELDS = {
    "prompt": "prompts",
    "negative_prompt": "negative",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "true_cfg_scale": "true_cfg",
    "width": "size",
    "height": "size",
    "num_frames": "frames",
    "fps": "fps",
    "num_images_per_prompt": "count",
    "num_videos_per_prompt": "count",
    "generator": "seed",
    "image": "images",
    "mask_image": "mask",
    "strength": "strength",
    "control_image": "control_image",
    "controlnet_conditioning_scale": "controlnet_scale",
    "adapter_conditioning_scale": "controlnet_scale",
    "ip_adapter_image": "ip_adapter",
}
# Arguments that `generate` itself decides.
RESERVED = frozenset({"output_type", "return_dict", "callback", "callback_steps", "callback_on_step_end"})
# Field of a Job -> what a Family must list in `takes` for it.
NEEDS = {
    "prompts": "prompt",
    "negative": "negative",
    "guidance": "guidance",
    "true_cfg": "true_cfg",
    "images": "image",
    "mask": "mask",
    "strength": "strength",
    "control_image": "control",
}


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A LoRA file and how strongly it is applied."""

    path: Path
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not isfinite(self.weight):
            raise InputError(f"the weight of {self.path} is {self.weight}; give a finite number, such as 0.8")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of a model: `count` pictures (or videos) for each prompt. None means what the model was made for."""

    prompts: tuple[str, ...] = ()
    model: str = "builtin"
    output: Path | None = None  # out.png, or out.mp4 for a video
    steps: int | None = None
    guidance: float | None = None
    true_cfg: float | None = None
    seed: int | None = None  # drawn and reported when None; picture i of a prompt has seed + i
    size: tuple[int, int] | None = None  # width, height in pixels
    frames: int | None = None
    fps: int | None = None
    count: int = 1
    negative: str | None = None
    scheduler: str | None = None
    few_step: bool = False  # with the model's few-step student
    dtype: str | None = None
    device: str | None = None
    loras: tuple[Lora, ...] = ()
    images: tuple[Path, ...] = ()
    mask: Path | None = None  # white is painted anew
    strength: float | None = None  # of the noise laid over the image, above 0 and up to 1
    control_image: Path | None = None
    controlnet: str | None = None  # folder or hub id of a ControlNet or T2I-Adapter
    controlnet_scale: float | None = None
    ip_adapter: Path | None = None  # its picture is the last of `images`
    variant: str | None = None
    config: Config | None = None  # how it is accelerated; None: stock diffusers
    call_kwargs: Mapping[str, Any] = field(default_factory=dict)
    overwrite: bool = False


def check_values(job: Job) -> None:
    """Check a job by itself. Raises InputError for the first thing that cannot be."""
    for name, (least, most) in BOUNDS.items():
        value = getattr(job, name)
        if value is not None and not least <= value <= most:
            raise InputError(f"{flag(name)} is {value}; it has to be from {least} to {most}")
    if job.strength is not None and not 0 < job.strength <= 1:
        raise InputError(f"--strength is {job.strength}; it has to be above 0 and at most 1")
    if job.size is not None and not all(1 <= side <= LARGEST_SIDE for side in job.size):
        raise InputError(f"--size is {job.size[0]}x{job.size[1]}; each side has to be from 1 to {LARGEST_SIDE} pixels")
    wants = {
        "mask": ("images", bool(job.images)),
        "strength": ("images", bool(job.images)),
        "ip_adapter": ("images", bool(job.images)),
        "controlnet": ("control_image", job.control_image is not None),
        "controlnet_scale": ("control_image", job.control_image is not None),
    }
    for name, (other, given) in wants.items():
        if getattr(job, name) is not None and not given:
            raise InputError(f"{flag(name)} needs {flag(other)} too")
    if any(not prompt.strip() for prompt in job.prompts):
        raise InputError("an empty prompt; say what to draw")
    if job.few_step and job.scheduler:
        raise InputError("--few-step brings its own scheduler; leave --scheduler out")
    for text in (*job.prompts, job.negative or ""):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError("a prompt that is not UTF-8; write it in a terminal or a file that is") from error
    for name in job.call_kwargs:
        if name in FIELDS:
            raise InputError(f"--call-kwargs cannot set {name}; give {flag(FIELDS[name])} instead")
        if name in RESERVED:
            raise InputError(f"--call-kwargs cannot set {name}: vivace decides it; leave it out")
    for path in [lora.path for lora in job.loras] + [path for path in [job.ip_adapter] if path]:
        checkpoint.header(path)


def check_family(job: Job, source: Source) -> None:
    """Check a job against the facts of its model's family. Raises InputError that names what the family takes."""
    family = source.family
    if family is None:
        return
    given = [name for name in NEEDS if getattr(job, name) not in (None, ())]
    if job.ip_adapter is not None and len(job.images) == 1:  # that picture is the adapter's
        given.remove("images")
    video = {"frames": job.frames, "fps": job.fps}
    refused = [name for name in given if NEEDS[name] not in family.takes]
    refused += [name for name, value in video.items() if value is not None and family.media != "video"]
    if refused:
        flags = [flag(name) for name, need in NEEDS.items() if need in family.takes]
        flags += [flag(name) for name in video if family.media == "video"]
        raise InputError(f"{family.title} does not take {flag(refused[0])}; of such inputs it takes {', '.join(flags)}")
    if "prompt" in family.takes and not job.prompts:
        raise InputError(f"{family.title} needs a prompt; say what to draw")
    if job.size is not None and (problem := size_problem(job.size, source)):
        raise InputError(f"--size {problem}")
    if job.frames is not None and (problem := frames_problem(job.frames, source)):
        raise InputError(f"--frames {problem}")


def size_problem(size: tuple[int, int], source: Source) -> str | None:
    """Why a model cannot make pictures of a size, width and height in pixels; None where it can, so far as is known."""
    made = f"{size[0]}x{size[1]} cannot be made"
    if source.longest is not None and max(size) > source.longest:
        return f"{made}: the longest side of {source.name} is {source.longest} pixels"
    multiple = source.multiple
    if any(side % multiple for side in size):
        width, height = (max(multiple, round(side / multiple) * multiple) for side in size)
        title = source.family.title if source.family else source.name
        return f"{made}: {title} needs multiples of {multiple}; the nearest is {width}x{height}"
    return None


def frames_problem(frames: int, source: Source) -> str | None:
    """Why a model cannot make videos of so many frames; None where it can, so far as is known."""
    family, nearest = source.family, nearest_frames(frames, source)
    if family is None or frames == nearest:
        return None
    return (
        f"{frames} cannot be made: {family.title} makes multiples of {family.packed} and one; the nearest is {nearest}"
    )


def nearest_frames(frames: int, source: Source) -> int:
    """The number of frames nearest to `frames` that a model can make, so far as is known."""
    packed = source.family.packed if source.family else 1
    return round((frames - 1) / packed) * packed + 1


def outputs(job: Job, *, media: str) -> list[Path]:
    """One path for each picture, prompt by prompt: out.png, or out-1.png, out-2.png, ... where there are several.

    Raises InputError where one exists (and may not be overwritten) or cannot be written.
    """
    suffix = ".mp4" if media == "video" else ".png"
    first = (job.output or Path(f"out{suffix}")).expanduser()
    if os.path.isdir(first):
        raise InputError(f"{first} is a folder; give a file, such as -o {first / f'out{suffix}'}")
    if first.suffix.lower() != suffix:
        kind = "a video" if media == "video" else "a picture"
        raise InputError(f"-o {first} does not end in {suffix}, which {kind} is written as; give -o out{suffix}")
    total = max(1, len(job.prompts)) * job.count
    width = len(str(total))
    numbered = [first.with_name(f"{first.stem}-{number:0{width}}{first.suffix}") for number in range(1, total + 1)]
    paths = [first] if total == 1 else numbered
    try:
        for path in paths:
            # A link that leads nowhere is there too.
            if (path.exists() or path.is_symlink()) and not (job.overwrite and path.is_file()):
                raise InputError(f"{path} exists; give --overwrite to replace it, or another -o")
        # Tried, not asked: permission bits say nothing of read-only file systems.
        with tempfile.TemporaryFile(dir=first.parent):
            pass
    except OSError as error:
        raise InputError(
            f"cannot write into {first.parent}: {os.strerror(error.errno or 0)}; give another -o"
        ) from error
    return paths


def flag(name: str) -> str:
    """How a field of a Job is spelled on the command line."""
    spelled = {"prompts": "PROMPT", "images": "--image", "loras": "--lora"}
    return spelled.get(name, f"--{name.replace('_', '-')}")
