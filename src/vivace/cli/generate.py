"""`vivace generate`: make pictures or videos, from the built-in model or any other."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vivace.errors import InputError

if TYPE_CHECKING:
    from vivace.config import Config
    from vivace.generation.generate import Result
    from vivace.generation.job import Job, Lora
    from vivace.steps import Step


def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to draw.")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The file to write; out.png or out.mp4.")
    ] = None,
    model: Annotated[str, typer.Option(help="builtin, a folder, a .safetensors file, or a hub id.")] = "builtin",
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="How closely the prompt is followed.")] = None,
    true_cfg: Annotated[float | None, typer.Option(help="Classifier-free guidance of a distilled model.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same picture.")] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Width and height in pixels.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of a video.")] = None,
    fps: Annotated[int | None, typer.Option(help="Frames a second of a video.")] = None,
    count: Annotated[int, typer.Option(help="Pictures for each prompt, with seeds SEED, SEED+1, ...")] = 1,
    negative: Annotated[str | None, typer.Option(help="What not to draw.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="A diffusers scheduler: euler, ddim, unipc, ...")] = None,
    cache: Annotated[
        str | None, typer.Option(metavar="POLICY[:k=v,...]", help="A step cache: firstblock:threshold=0.1, or a file.")
    ] = None,
    few_step: Annotated[
        bool, typer.Option("--few-step", help="The model's few-step student: as quick as it gets.")
    ] = False,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")] = None,
    lora: Annotated[list[str] | None, typer.Option(metavar="FILE[:weight]", help="A LoRA; repeatable.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="A picture to start from or edit; repeatable.")] = None,
    mask: Annotated[Path | None, typer.Option(help="Where to paint the image anew: white.")] = None,
    strength: Annotated[float | None, typer.Option(help="How much of the image changes, up to 1.")] = None,
    control_image: Annotated[Path | None, typer.Option(help="Edges, depth, pose, ... for the ControlNet.")] = None,
    controlnet: Annotated[str | None, typer.Option(help="A ControlNet's or T2I-Adapter's folder or hub id.")] = None,
    controlnet_scale: Annotated[float | None, typer.Option(help="How strongly the ControlNet steers.")] = None,
    ip_adapter: Annotated[Path | None, typer.Option(help="An IP-Adapter; it sees the last --image.")] = None,
    variant: Annotated[
        str | None, typer.Option(help="Weight variant of a folder (fp16), or which model a file is.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Accelerate it first: exact, ...; see vivace plan.")] = None,
    fields: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="A Config field of its own; repeatable.")
    ] = None,
    vram: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Device memory to keep within: 12GB, auto, or a level.")
    ] = None,
    call_kwargs: Annotated[str | None, typer.Option(metavar="JSON", help="More arguments of the pipeline.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file with one prompt a line, in place of PROMPT.")] = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="Spread over the GPUs of a Ray cluster; run again, it makes what is missing.")
    ] = False,
    address: Annotated[str | None, typer.Option(help="With --ray: a cluster that runs, not one of its own.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="With --ray: how many; one a GPU, or one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace files that exist.")] = False,
    show: Annotated[bool, typer.Option(help="Preview the picture in the terminal.")] = False,
) -> None:
    """Make a picture (or a video) of PROMPT."""
    from vivace.generation import preview
    from vivace.generation.generate import check
    from vivace.generation.generate import generate as run
    from vivace.generation.job import Job
    from vivace.generation.prompt import read_prompts

    if prompt is not None and prompts is not None:
        raise InputError("PROMPT and --prompts were both given; give one")
    job = Job(
        prompts=read_prompts(prompts) if prompts else () if prompt is None else (prompt,),
        model=model,
        output=output,
        steps=steps,
        guidance=guidance,
        true_cfg=true_cfg,
        seed=seed,
        size=read_size(size) if size else None,
        frames=frames,
        fps=fps,
        count=count,
        negative=negative,
        scheduler=scheduler,
        few_step=few_step,
        dtype=dtype,
        device=device,
        loras=tuple(read_lora(text) for text in lora or ()),
        images=tuple(image or ()),
        mask=mask,
        strength=strength,
        control_image=control_image,
        controlnet=controlnet,
        controlnet_scale=controlnet_scale,
        ip_adapter=ip_adapter,
        variant=variant,
        config=read_config(preset, fields or (), cache=cache, vram=vram),
        call_kwargs=read_call_kwargs(call_kwargs) if call_kwargs else {},
        overwrite=overwrite,
    )
    if (address or workers) and not ray:
        raise InputError("--address and --workers need --ray; add it, or leave them out")
    check(replace(job, overwrite=overwrite or ray))  # before the heavy imports of what follows
    with quiet(), bar() as on_step:
        result = _on_ray(job, address, workers=workers, on_step=on_step) if ray else run(job, on_step=on_step)
    if as_json:
        print(json.dumps(result.to_dict()))
        return
    for made in result.made:
        if show:
            preview.show(made.path)
        print(f"{made.path}  (seed {made.seed}, {result.steps} step{'s' * (result.steps > 1)}, {made.seconds:.1f} s)")


def _on_ray(job: Job, address: str | None, *, workers: int | None, on_step: Callable[[Step], None] | None) -> Result:
    from vivace.cluster.connect import connect
    from vivace.generation.spread import generate

    with connect(address):
        return generate(job, workers=workers, on_step=on_step)


def read_size(text: str) -> tuple[int, int]:
    """`768x512` -> (768, 512). Raises InputError."""
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise InputError(f"--size {text!r} is not WxH in pixels; write it like 768x512")
    return int(width), int(height)


def read_lora(text: str) -> Lora:
    """`style.safetensors:0.8` -> its path and weight; the weight is 1 where none is given. Raises InputError."""
    from vivace.generation.job import Lora

    path, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        return Lora(path=Path(text).expanduser())
    try:
        return Lora(path=Path(path).expanduser(), weight=float(weight))
    except ValueError as error:
        raise InputError(f"--lora {text!r}: {weight!r} is not a number; write it like style.safetensors:0.8") from error


def read_config(
    preset: str | None, fields: Sequence[str], *, cache: str | None = None, vram: str | None = None
) -> Config | None:
    """The Config that `--preset`, `--set`, `--cache` and `--vram` ask for; None without any. Raises InputError."""
    from vivace.config import parse_fields, resolve

    own = {"cache": cache, "vram": vram}
    wanted = parse_fields(fields) | {name: value for name, value in own.items() if value is not None}
    return resolve(preset, **wanted) if preset or wanted else None


def read_call_kwargs(text: str) -> dict[str, Any]:
    """A JSON object. Raises InputError."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise InputError(f"--call-kwargs is not JSON ({error}); write it like '{{\"eta\": 0.5}}'") from error
    if not isinstance(found, dict):
        raise InputError("--call-kwargs is not a JSON object; write it like '{\"eta\": 0.5}'")
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """Leave stderr to vivace: its own warnings, one line each, and none of the libraries' notes and bars.

    For a process that only runs this verb: the libraries' settings are theirs for the whole process.
    """
    import diffusers.utils.logging
    import huggingface_hub.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, huggingface_hub.utils.logging, transformers.utils.logging):
        # Their errors too: what is raised beside them is told once, by us.
        library.set_verbosity(logging.CRITICAL)
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("vivace: warning: %(message)s"))
    logger = logging.getLogger("vivace")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.removeHandler(handler)


@contextmanager
def bar() -> Iterator[Callable[[Step], None] | None]:
    """A progress bar on stderr with the time left, where stderr is a terminal; else None."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("loading", total=None)

        def on_step(step: Step) -> None:
            name = f"picture {step.picture + 1} of {step.pictures}" if step.pictures > 1 else "drawing"
            done, total = step.picture * step.total + step.done, step.pictures * step.total
            progress.update(task, description=name, completed=done, total=total)

        yield on_step
