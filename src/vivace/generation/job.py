"""A picture job: what `generate` is asked for, and the checks that need no model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vivace import checkpoint
from vivace.config import Config
from vivace.errors import InputError
from vivace.load import Source

LARGEST_SIDE = 16384  # pixels
SEEDS = 2**63
# Arguments of a pipeline's call that `generate` itself decides.
RESERVED = frozenset({"generator", "output_type", "return_dict", "callback", "callback_on_step_end"})
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
    least = {
        "steps": 1,
        "count": 1,
        "frames": 1,
        "fps": 1,
        "guidance": 0,
        "true_cfg": 0,
        "seed": 0,
        "controlnet_scale": 0,
    }
    for name, bound in least.items():
        value = getattr(job, name)
        if value is not None and not bound <= value < SEEDS:
            raise InputError(f"{flag(name)} is {value}; it has to be {bound} or more")
    if job.strength is not None and not 0 < job.strength <= 1:
        raise InputError(f"--strength is {job.strength}; it has to be above 0 and at most 1")
    if job.size is not None and not all(1 <= side <= LARGEST_SIDE for side in job.size):
        raise InputError(f"--size is {job.size[0]}x{job.size[1]}; each side has to be from 1 to {LARGEST_SIDE} pixels")
    wants = {
        "mask": ("images", bool(job.images)),
        "strength": ("images", bool(job.images)),
        "ip_adapter": ("images", bool(job.images)),
        "controlnet": ("control_image", job.control_image is not None),
        "controlnet_scale": ("controlnet", job.controlnet is not None),
    }
    for name, (other, given) in wants.items():
        if getattr(job, name) is not None and not given:
            raise InputError(f"{flag(name)} needs {flag(other)} too")
    if any(not prompt.strip() for prompt in job.prompts):
        raise InputError("an empty prompt; say what to draw")
    if job.few_step and job.scheduler:
        raise InputError("--few-step brings its own scheduler; leave --scheduler out")
    taken = sorted(RESERVED & job.call_kwargs.keys())
    if taken:
        raise InputError(f"--call-kwargs cannot set {', '.join(taken)}: vivace decides these")
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
    if job.size is not None and any(side % family.multiple for side in job.size):
        width, height = (max(family.multiple, round(side / family.multiple) * family.multiple) for side in job.size)
        raise InputError(
            f"--size {job.size[0]}x{job.size[1]} cannot be made: {family.title} needs multiples of {family.multiple}; "
            f"the nearest is {width}x{height}"
        )


def outputs(job: Job, *, media: str) -> list[Path]:
    """One path for each picture, prompt by prompt: out.png, or out-1.png, out-2.png, ... where there are several.

    Raises InputError where one exists (and may not be overwritten) or cannot be written.
    """
    suffix = ".mp4" if media == "video" else ".png"
    first = (job.output or Path(f"out{suffix}")).expanduser()
    if first.is_dir():
        raise InputError(f"{first} is a folder; give a file, such as -o {first / f'out{suffix}'}")
    if first.suffix.lower() != suffix:
        raise InputError(f"-o {first} does not end in {suffix}, and {suffix} is what a {media} is written as")
    total = max(1, len(job.prompts)) * job.count
    width = len(str(total))
    numbered = [first.with_name(f"{first.stem}-{number:0{width}}{first.suffix}") for number in range(1, total + 1)]
    paths = [first] if total == 1 else numbered
    for path in paths:
        if path.exists() and not (job.overwrite and path.is_file()):
            raise InputError(f"{path} exists; give --overwrite to replace it, or another -o")
    try:
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
