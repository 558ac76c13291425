"""The main job as a plain function: a `Job` in, pictures on disk and a `Result` out."""

from __future__ import annotations

import difflib
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vivace import few_step, inputs
from vivace.config import Config, preset_name
from vivace.errors import InputError, first_line
from vivace.fingerprint import fingerprint
from vivace.generation import conditioning, picture, video
from vivace.generation.job import FIELDS, RESERVED, SEEDS, Job, check_family, check_values, flag, outputs
from vivace.generation.prompt import cut_lines, cuts
from vivace.generation.seed import seeded
from vivace.load import Source, find, load_source, resolve_device, resolve_dtype
from vivace.scheduler import scheduler_class, use_scheduler
from vivace.steps import Step, counted

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from PIL import Image

logger = logging.getLogger(__name__)

# Field of a Job -> the argument of a pipeline's call that says the same.
CALL = {
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "true_cfg": "true_cfg_scale",
    "negative": "negative_prompt",
    "strength": "strength",
    "frames": "num_frames",
}
FPS = 16  # frames a second, where neither the job nor the pipeline names a rate


@dataclass(frozen=True, kw_only=True)
class Made:
    """One picture or video that was written."""

    path: Path
    prompt: str
    seed: int
    seconds: float  # the pipeline's call: text encoders, all steps, VAE


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a job did."""

    made: tuple[Made, ...]
    steps: int  # as the denoiser ran them: strength leaves some out
    size: tuple[int, int]  # width, height in pixels
    frames: int
    applied: Mapping[str, Any]  # everything that decided the pixels, besides prompt and seed
    cache: Mapping[str, Any]  # denoiser -> calls computed and skipped, the time that saved; empty without a cache
    timings: Mapping[str, float]  # seconds
    report: Mapping[str, Any] | None  # what `accelerate` did; None: nothing was asked of it

    def to_dict(self) -> dict[str, Any]:
        """For JSON: paths as text, one entry for each picture."""
        return {
            "paths": [str(made.path) for made in self.made],
            "seed": self.made[0].seed,
            "pictures": [{**asdict(made), "path": str(made.path)} for made in self.made],
            **{name: getattr(self, name) for name in ("steps", "size", "frames", "applied", "cache")},
            **{name: getattr(self, name) for name in ("timings", "report")},
        }


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A job that passed every check which needs no weights."""

    job: Job
    source: Source
    pipeline: type[Any]
    control: str | None  # class name of the control model
    call: dict[str, Any]  # the pipeline's arguments, less prompt and generator
    paths: list[Path]
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One picture or video that was written, and how it was drawn."""

    made: Made
    steps: int
    size: tuple[int, int]
    frames: int


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A job whose model is loaded."""

    ready: Ready
    pipe: DiffusionPipeline
    applied: Mapping[str, Any]

    def draw(
        self,
        prompt: str,
        path: Path,
        *,
        seed: int,
        on_step: Callable[[Step], None] | None = None,
        picture: int = 0,
        pictures: int = 1,
    ) -> Drawn:
        """Make and write one of the job's pictures. Raises InputError."""
        with counted(self.pipe, on_step, picture=picture, pictures=pictures) as counter:
            start = time.perf_counter()
            frames = _call(self.pipe, self.ready, prompt=prompt, seed=seed)
            seconds = round(time.perf_counter() - start, 3)
        if self.ready.job.call_kwargs and not counter.total:
            raise InputError(f"{', '.join(self.ready.job.call_kwargs)} of --call-kwargs leave no step to do")
        _write(frames, path, ready=self.ready, prompt=prompt, seed=seed, applied=self.applied)
        made = Made(path=path, prompt=prompt, seed=seed, seconds=seconds)
        return Drawn(made=made, steps=counter.total, size=frames[0].size, frames=len(frames))


def open_job(job: Job) -> Opened:
    """Check a job and load its model. Raises InputError."""
    ready = prepare(job)
    pipe = _load(ready)
    return Opened(ready=ready, pipe=pipe, applied=_applied(ready, pipe))


def plan_of(job: Job, *, seed: int) -> list[tuple[str, int]]:
    """Prompt and seed of every picture, in order."""
    return [(prompt, (seed + number) % SEEDS) for prompt in job.prompts or ("",) for number in range(job.count)]


def draw_seed() -> int:
    """For a job that names none."""
    return secrets.randbelow(2**32)


def generate(job: Job, *, on_step: Callable[[Step], None] | None = None) -> Result:
    """Make and write what `job` asks for.

    Everything that can be checked is checked before the model is loaded, and before anything is written. A prompt that
    a text encoder has no room for is cut, which is logged as a warning. Raises InputError.
    """
    began = time.perf_counter()
    opened = open_job(job)
    loaded = time.perf_counter()
    plan = plan_of(job, seed=draw_seed() if job.seed is None else job.seed)
    drawn = [
        opened.draw(prompt, path, seed=seed, on_step=on_step, picture=index, pictures=len(plan))
        for index, ((prompt, seed), path) in enumerate(zip(plan, opened.ready.paths, strict=True))
    ]
    total = time.perf_counter() - began
    timings = {"load_s": loaded - began, "generate_s": sum(one.made.seconds for one in drawn), "total_s": total}
    last = drawn[-1]
    return Result(
        made=tuple(one.made for one in drawn),
        steps=last.steps,
        size=last.size,
        frames=last.frames,
        applied=opened.applied,
        cache=_cached(opened.pipe) if job.config and job.config.cache else {},
        timings={name: round(value, 3) for name, value in timings.items()},
        report=_report(opened.pipe) if job.config else None,
    )


def check(job: Job) -> tuple[Source, list[Path], conditioning.Pictures]:
    """The checks that need no torch, quick enough to come first: where the model is, what to write, what to read.

    Raises InputError.
    """
    check_values(job)
    source = find(job.model, variant=job.variant)
    if job.few_step:
        source = few_step.source_of(source)
    check_family(job, source)
    media = source.family.media if source.family else "image"
    if media == "video":
        video.require()
    return source, outputs(job, media=media), conditioning.read_pictures(job)


def prepare(job: Job) -> Ready:
    """Check a job and settle how it will run; no weight is read and nothing is written. Raises InputError."""
    source, paths, pictures = check(job)
    control = conditioning.control_class(job)
    pipeline = inputs.choose(source, pictures.wanted, control_class=control)
    conditioning.check_adapters(job, pipeline)
    if job.scheduler:
        scheduler_class(job.scheduler, prediction=source.prediction)
    call = _arguments(job, source, pipeline)
    call |= conditioning.picture_arguments(pictures, pipeline, job=job, source=source)
    if none := inputs.no_step(pipeline, call, prediction=source.prediction):
        raise InputError(f"--{none}; raise --strength or --steps")
    if unsaid := inputs.unsaid(pipeline, {*call, *job.call_kwargs, *(("prompt",) if job.prompts else ())}):
        needs = flag(FIELDS[unsaid[0]]) if unsaid[0] in FIELDS else f"{unsaid[0]}; give it by --call-kwargs"
        raise InputError(f"{pipeline.__name__} needs {needs}")
    device = resolve_device(job.device)
    return Ready(
        job=job,
        source=source,
        pipeline=pipeline,
        control=control,
        call=call | dict(job.call_kwargs),
        paths=paths,
        device=device,
        dtype=resolve_dtype(job.dtype, device),
    )


def _arguments(job: Job, source: Source, pipeline: type[Any]) -> dict[str, Any]:
    """The arguments of the pipeline's call that a job's plain values and the model's defaults set."""
    accepted = inputs.arguments(pipeline)
    found = {CALL[name]: value for name, value in source.defaults.items() if CALL.get(name) in accepted}
    for name, argument in CALL.items():
        value = getattr(job, name)
        if value is None:
            continue
        if argument not in accepted:
            takes = ", ".join(flag(field) for field, argument in CALL.items() if argument in accepted)
            raise InputError(f"{pipeline.__name__} does not take {flag(name)}; of such values it takes {takes}")
        found[argument] = value
    if job.prompts and "prompt" not in accepted:
        raise InputError(f"{pipeline.__name__} does not take PROMPT")
    if job.size and "width" not in accepted and not (job.images and inputs.goes_by_image(pipeline, source)):
        raise InputError(f"{pipeline.__name__} does not take --size")
    if job.fps is not None and "fps" in accepted:
        found["fps"] = job.fps
    for name in job.call_kwargs:
        if name not in accepted:
            near = difflib.get_close_matches(name, sorted(accepted.keys() - RESERVED), n=1, cutoff=0.0)[0]
            near += f" (which is {flag(FIELDS[near])})" if near in FIELDS else ""
            raise InputError(f"{pipeline.__name__} has no argument {name!r} for --call-kwargs; the nearest is {near}")
    return found


def _load(ready: Ready) -> DiffusionPipeline:
    job, source = ready.job, ready.source
    components = conditioning.load_control(job, ready.pipeline, name=ready.control, dtype=ready.dtype)
    # A budget's weights go from the host to where they will live.
    device = "cpu" if job.config and job.config.vram else ready.device
    pipe = load_source(
        source, dtype=ready.dtype, device=device, variant=job.variant, pipeline=ready.pipeline, **components
    )
    if job.few_step and source.path is not None:
        few_step.use_few_step(pipe, source.path / few_step.FOLDER)
    conditioning.adapt(pipe, job)
    if job.scheduler:
        use_scheduler(pipe, job.scheduler, prediction=source.prediction)
    _check_steps(pipe, ready)
    accepted = inputs.arguments(ready.pipeline)
    longest = ready.call.get("max_sequence_length")
    if longest is None and "max_sequence_length" in accepted:
        longest = accepted["max_sequence_length"].default
    longest = longest if isinstance(longest, int) else None  # else the pipeline will say what is wrong with it
    for prompt in job.prompts:
        for line in cut_lines(cuts(pipe, prompt, longest=longest)):
            logger.warning(line)
    if job.config:
        from vivace.accelerate import accelerate

        accelerate(pipe, job.config)
    return pipe


def _check_steps(pipe: DiffusionPipeline, ready: Ready) -> None:
    """Check the steps where stock would fail after the last of them. Raises InputError."""
    steps, known = ready.job.steps or 0, pipe.components["scheduler"].config.get("num_train_timesteps", 0)
    if ready.source.prediction != "flow" and steps > known > 0:
        raise InputError(f"--steps is {steps}; {ready.source.name} knows {known} timesteps, and each is a step at most")


def _report(pipe: DiffusionPipeline) -> dict[str, Any]:
    from vivace.report import report

    return report(pipe).to_dict()


def _call(pipe: DiffusionPipeline, ready: Ready, *, prompt: str, seed: int) -> list[Image.Image]:
    """Run the pipeline once: one picture, or the frames of one video. Raises InputError for what it cannot take."""
    import torch

    more = ", ".join(ready.job.call_kwargs)
    text = {"prompt": prompt} if prompt else {}
    run: Any = pipe
    try:
        with seeded(seed, ready.device) as generator:
            output = run(**text, **ready.call, generator=generator, output_type="pil")
    except torch.cuda.OutOfMemoryError as error:
        raise InputError("the GPU has too little memory for this; use --vram auto, or a smaller --size") from error
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{type(pipe).__name__} refused: {first_line(error)}") from error
    except Exception as error:  # stock pipelines check few of their arguments
        if not more:
            raise
        raise InputError(f"{type(pipe).__name__} cannot run with {more} of --call-kwargs: {_said(error)}") from error
    return list(output.frames[0]) if hasattr(output, "frames") else [output.images[0]]


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _cached(pipe: DiffusionPipeline) -> dict[str, Any]:
    from vivace.report import report

    return report(pipe).cache


def _write(
    frames: list[Image.Image], path: Path, *, ready: Ready, prompt: str, seed: int, applied: Mapping[str, Any]
) -> None:
    if path.suffix.lower() == ".mp4":
        fps = ready.job.fps or ready.call.get("fps", FPS)
        video.write(frames, path, fps=fps, prompt=prompt, seed=seed, settings=applied)
    else:
        picture.write(frames[0], path, prompt=prompt, seed=seed, settings=applied)


def _applied(ready: Ready, pipe: DiffusionPipeline) -> dict[str, Any]:
    """Everything besides prompt and seed that decided the pixels, as plain values."""
    from vivace import __version__

    return {
        **asked(ready),
        "scheduler": type(pipe.components["scheduler"]).__name__,
        "dtype": str(ready.dtype).removeprefix("torch."),
        "device": str(ready.device),
        "vivace": __version__,
    }


def asked(ready: Ready) -> dict[str, Any]:
    """What of that is known before a model is loaded, and the same on every machine that has the same files."""
    job = ready.job
    plain = {name: value for name, value in ready.call.items() if isinstance(value, str | int | float | list | dict)}
    files = {"image": job.images, "mask": job.mask, "control_image": job.control_image, "ip_adapter": job.ip_adapter}
    return {
        "model": job.model,
        "pipeline": ready.pipeline.__name__,
        **{name: value for name, value in plain.items() if not _holds_pictures(value)},
        **{
            name: [str(p) for p in value] if isinstance(value, tuple) else str(value)
            for name, value in files.items()
            if value
        },
        **({"lora": [f"{lora.path}:{lora.weight:g}" for lora in job.loras]} if job.loras else {}),
        **({"controlnet": job.controlnet} if job.controlnet else {}),
        **({"few_step": True} if job.few_step else {}),
        **(_accelerated(job.config) if job.config else {}),
        **({"given": given} if (given := _given(job)) else {}),
        "contents": _contents(ready),
    }


def _given(job: Job) -> dict[str, Any]:
    """What else decides the pixels, where it was not left to the model: by what was said, not by what became of it."""
    said = {name: getattr(job, name) for name in ("scheduler", "dtype", "variant", "fps")}
    return {name: value for name, value in said.items() if value is not None}


def _contents(ready: Ready) -> dict[str, str]:
    """The fingerprints of the files that a job names, by the names that it has for them."""
    job, control = ready.job, Path(ready.job.controlnet or "")
    named = [*job.images, job.mask, job.control_image, job.ip_adapter, *(lora.path for lora in job.loras)]
    found = {str(path): fingerprint(path) for path in named if path is not None}
    if ready.source.path is not None:
        found[job.model] = fingerprint(ready.source.path)
    if job.controlnet and control.exists():
        found[job.controlnet] = fingerprint(control)
    return found


def _accelerated(config: Config) -> dict[str, Any]:
    """The preset's name, or a Config that is no preset's, field by field; the cache as the command line spells it."""
    from vivace.cache import spell

    name = preset_name(replace(config, cache=None))
    fields = {} if name != "custom" else {"config": {k: v for k, v in vars(config).items() if k != "cache"}}
    return {"preset": name, **fields, **({"cache": spell(config.cache)} if config.cache else {})}


def _holds_pictures(value: object) -> bool:
    return isinstance(value, list) and any(hasattr(item, "getbands") for item in value)
