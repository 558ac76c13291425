"""`vivace eval`: what a model's pictures are worth, in figures."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vivace.cli.command import command
from vivace.errors import InputError

if TYPE_CHECKING:
    from vivace.builtin.reader import Reader
    from vivace.evals.builtin import Answers, Exam
    from vivace.evals.contest import Contest, Contestant, Order
    from vivace.evals.instruments import Instruments
    from vivace.load import Source

PLACES = ("-o", "--output", "--json")  # of the figures: the reader's own


def eval(
    model: Annotated[
        str, typer.Argument(help="What to examine: builtin; with --presets also a folder, a file or a hub id.")
    ] = "builtin",
    presets: Annotated[
        str | None, typer.Option(help="Compare presets on prompts: the reference first, as exact,balanced.")
    ] = None,
    cache: Annotated[
        list[str] | None, typer.Option(metavar="POLICY[:k=v,...]", help="Compare this step cache too; repeatable.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="With --presets: one prompt a line; builtin draws its own.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="With --presets or --ray: the folder to write; eval.")
    ] = None,
    captions: Annotated[int | None, typer.Option(min=1, help="Captions to draw: 4000, or 16 with --presets.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; the model's own number where not given.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; the model's own where not given.")] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="With --presets: width and height in pixels.")] = None,
    frames: Annotated[
        int | None, typer.Option(help="With --presets: of a video; the model's own where not given.")
    ] = None,
    lpips: Annotated[bool, typer.Option("--lpips", help="With --presets: LPIPS (needs the extra \\[eval]).")] = False,
    lpips_weights: Annotated[Path | None, typer.Option(help="AlexNet's weights for LPIPS, as torchvision's.")] = None,
    clip: Annotated[str | None, typer.Option(help="With --presets: CLIP score too, of this folder or hub id.")] = None,
    fid: Annotated[Path | None, typer.Option(help="With --presets: FID from the pictures in this folder.")] = None,
    kid: Annotated[Path | None, typer.Option(help="With --presets: KID from the pictures in this folder.")] = None,
    inception: Annotated[Path | None, typer.Option(help="Inception's weights, as torch-fidelity's.")] = None,
    seed: Annotated[int, typer.Option(help="Draws the captions and the noise.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")] = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="Spread over the GPUs of a Ray cluster; run again it goes on.")
    ] = False,
    address: Annotated[str | None, typer.Option(help="With --ray: a cluster that runs, not one of its own.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="With --ray: how many; one a GPU, or one.")] = None,
    json: Annotated[Path | None, typer.Option(help="Without --presets: also write the figures to this file.")] = None,
) -> None:
    """Examine the built-in model, or compare presets and step caches of any model.

    Alone: caption accuracy with its interval, FID and KID in its reader's features. With --presets or --cache: pictures
    of the same prompts and seeds, their distance from the reference beside the noise floor and beside what the same
    time buys with fewer steps; a contact sheet and one HTML page. Run again it goes on where it was stopped; under
    `accelerate launch` every GPU draws its share, and with --ray every GPU of a cluster.
    """
    from vivace.cli.figures import call_of, check_writable, prompts_of, settings_of
    from vivace.load import find

    if (address or workers) and not ray:
        raise InputError("--address and --workers need --ray; add it, or leave them out")
    if presets is None and not cache and model != "builtin":
        raise InputError(f"eval examines builtin, got {model!r}; only its world has a reader (compare with --presets)")
    compares = {"--prompts": prompts, "--size": size, "--frames": frames}
    compares |= {"--lpips": lpips, "--lpips-weights": lpips_weights}
    compares |= {"--clip": clip, "--fid": fid, "--kid": kid, "--inception": inception, "-o": None if ray else output}
    _check_use(compares, alone={"--json": json}, comparing=presets is not None or bool(cache))
    folder = output or Path("eval")
    source = find(model)
    settings = settings_of(source, steps=steps, guidance=guidance, seed=seed)
    if presets is None and not cache:
        if json is not None:
            check_writable(json, option="--json")
        cluster = {"address": address, "workers": workers, "folder": folder} if ray else None
        _examine(source, settings, captions=captions or 4000, seed=seed, device=device, json=json, cluster=cluster)
        return
    from vivace.cache import parse
    from vivace.config import PRESETS, resolve
    from vivace.evals.contest import Order, contents_of, contestants

    names = [name.strip() for name in (presets or "exact").split(",")]
    if len(names) == 1 and not cache:
        raise InputError(
            f"there is nothing to compare with {presets!r}; name a second preset after it, or give --cache"
        )
    if prompts is not None and captions is not None:
        raise InputError("--captions and --prompts were both given; give one")
    base = resolve(names[0]) if names[0] in PRESETS else None
    compared = {spelled: resolve(base, cache=parse(spelled)) for spelled in cache or ()}
    texts = prompts_of(prompts, builtin=model == "builtin", captions=captions or 16, seed=seed)
    instruments = _instruments(
        lpips=lpips or lpips_weights is not None, lpips_weights=lpips_weights, clip=clip, fid=fid, kid=kid,
        inception=inception, drawn=len(texts),
    )  # fmt: skip
    order = Order(
        model=source.name, contents=contents_of(source), folder=folder.absolute() if ray else folder, prompts=texts,
        steps=settings["steps"], seed=seed, call=call_of(source, settings, size=size, frames=frames), presets=names,
        configs=compared, device=device,
    )  # fmt: skip
    contestants(presets=names, configs=compared, steps=order.steps)
    compare = partial(_draw_on_ray, address=address, workers=workers) if ray else _draw
    drawn = compare(source, order)
    if drawn is not None:
        _show(*drawn, instruments=instruments)


def _check_use(compares: Mapping[str, Any], *, alone: Mapping[str, Any], comparing: bool) -> None:
    """Raises InputError for an option that would change nothing: each is by its name and of one of the two uses."""
    idle = [name for name, value in (alone if comparing else compares).items() if value]
    if idle and comparing:
        raise InputError(f"{idle[0]} is for the examination alone; a comparison writes its figures into its folder")
    if idle:
        raise InputError(f"{idle[0]} needs --presets or --cache; add one, or leave it out")


Drawn = tuple["Contest", "Contestant", list["Contestant"]]
"""A comparison that is drawn: its reference, and the others."""


def _draw(source: Source, order: Order) -> Drawn | None:
    """Under `accelerate launch` one process a GPU, of which the first has something to show; alone, one process."""
    from accelerate import PartialState

    from vivace.cli.figures import status
    from vivace.cli.generate import quiet
    from vivace.evals.comparison import draw_all
    from vivace.load import load_source

    state = PartialState(cpu=order.device == "cpu")
    order = replace(order, ranks=state.num_processes)
    with quiet(), status() as tell:
        pipe = load_source(source, device=order.device or (str(state.device) if order.ranks > 1 else None))
        pipe.set_progress_bar_config(disable=True)
        contest = order.contest(
            pipe, prediction=source.prediction, rank=state.process_index, tell=tell,
            together=lambda contestant: state.wait_for_everyone(),
        )  # fmt: skip
        reference, others = draw_all(contest, presets=order.presets, configs=order.configs)
    return (contest, reference, others) if state.is_main_process else None


def _draw_on_ray(source: Source, order: Order, *, address: str | None, workers: int | None) -> Drawn:
    from vivace.cli.figures import status
    from vivace.cli.generate import quiet
    from vivace.cluster.connect import connect
    from vivace.evals.spread import draw, ranks_of

    with quiet(), status() as tell, connect(address):
        tell("drawing")
        order = replace(order, ranks=ranks_of(order.prompts, workers=workers))
        drawn = draw(order)
    return order.contest(None, prediction=source.prediction, place=drawn.place), drawn.reference, drawn.others


def _show(contest: Contest, reference: Contestant, others: list[Contestant], *, instruments: Instruments) -> None:
    """Write what was found about a comparison that is drawn, and say it."""
    from vivace.cli.figures import show
    from vivace.evals.comparison import write_all
    from vivace.machine import machine

    count = len(contest.prompts)
    about = {"command": command(without=PLACES), "model": contest.model, "prompts": count}
    about |= {"steps": contest.steps, "seed": contest.seed, "place": contest.place, "call": contest.call}
    written = write_all(contest, reference, others, instruments=instruments, about=about | {"machine": machine()})
    show(_table(written.verdicts, title=f"{contest.model}: {count} prompts, {contest.steps} steps"))
    print(f"{written.report}\n{written.sheet}\n{written.metrics}")


def _instruments(
    *,
    lpips: bool,
    lpips_weights: Path | None,
    clip: str | None,
    fid: Path | None,
    kid: Path | None,
    inception: Path | None,
    drawn: int,
) -> Instruments:
    """What was asked for, with its weights; raises InputError for what is missing, before anything is drawn."""
    from vivace.evals import perceptual
    from vivace.evals.instruments import Dataset, Instruments

    if inception and not (fid or kid):
        raise InputError("--inception is for FID and KID; add --fid or --kid, or leave it out")
    if fid and kid and fid != kid:
        raise InputError(f"--fid and --kid take one folder, got {fid} and {kid}; run twice, nothing is drawn twice")
    paired = {"LPIPS": perceptual.lpips(weights=lpips_weights)} if lpips else {}
    captioned = {"CLIP score": perceptual.clip_score(clip)} if clip else {}
    dataset = None
    if folder := fid or kid:
        distances = tuple(name for name, asked in (("FID", fid), ("KID", kid)) if asked)
        dataset = Dataset.of(folder, perceptual.inception(inception), distances=distances, drawn=drawn)
    return Instruments(paired=paired, captioned=captioned, dataset=dataset)


def _table(verdicts: list[Any], *, title: str) -> Any:
    from rich.table import Table

    table = Table("contestant", title=title)
    names = list(dict.fromkeys(name for verdict in verdicts for name in verdict.distances))
    whole = list(dict.fromkeys(metric.name for verdict in verdicts for metric in verdict.dataset))
    for name in ("s", "speed", "computed", *names, *whole):
        table.add_column(name, justify="right")
    table.add_column("at equal time")
    for verdict in verdicts:
        means = [f"{verdict.distances[n].mean().item():.4g}" if n in verdict.distances else "" for n in names]
        seconds = "" if verdict.seconds is None else f"{verdict.seconds:.3g}"
        speed = "" if verdict.speedup is None else f"{verdict.speedup:.2f}"
        computed = "" if verdict.computed is None else f"{verdict.computed:.0%}"
        means += [f"{metric.value:.4g}" for metric in verdict.dataset]
        table.add_row(verdict.contestant.name, seconds, speed, computed, *means, verdict.wins)
    return table


def _examine(
    source: Source,
    settings: dict[str, Any],
    *,
    captions: int,
    seed: int,
    device: str | None,
    json: Path | None,
    cluster: dict[str, Any] | None,
) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from vivace.cli.figures import show
    from vivace.cli.generate import quiet
    from vivace.evals import builtin
    from vivace.evals.metric import table, to_json
    from vivace.machine import machine

    exam = builtin.draw_exam(captions, seed=seed)
    call = {"guidance_scale": settings["guidance"]} if "guidance" in settings else {}
    asked = {"steps": settings["steps"], "seed": seed, "call": call, "device": device}
    with quiet(), Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("drawing", total=captions)
        take = _take if cluster is None else partial(_take_on_ray, **cluster)
        answers, reader, place = take(
            exam, source, on_pictures=lambda done: progress.update(task, completed=done), **asked
        )
    rows = builtin.metrics(exam, answers, reader, seed=seed)
    if json is not None:
        about = {"command": command(without=PLACES), "captions": captions, **settings, "seed": seed}
        json.write_text(to_json(rows, about=about | place | {"machine": machine()}) + "\n", encoding="utf-8")
    show(table(rows, title=f"{source.name}: {captions:,} captions, {settings['steps']} steps"))


Taken = tuple["Answers", "Reader", dict[str, str]]
"""An exam's answers, the reader that judged them, and the device and type they were drawn with."""


def _take(
    exam: Exam,
    source: Source,
    *,
    steps: int,
    seed: int,
    call: dict[str, Any],
    device: str | None,
    on_pictures: Callable[[int], None],
) -> Taken:
    from vivace.builtin.reader import load_reader
    from vivace.evals import builtin
    from vivace.load import load_source

    pipe = load_source(source, device=device)
    pipe.set_progress_bar_config(disable=True)
    reader = load_reader(device=pipe.device)
    answers = builtin.take(exam, pipe, reader, steps=steps, seed=seed, on_pictures=on_pictures, **call)
    return answers, reader, {"device": str(pipe.device), "dtype": str(pipe.dtype).removeprefix("torch.")}


def _take_on_ray(
    exam: Exam,
    source: Source,
    *,
    on_pictures: Callable[[int], None],
    address: str | None,
    workers: int | None,
    folder: Path,
    **asked: Any,
) -> Taken:
    from vivace.builtin.reader import load_reader
    from vivace.cluster.connect import connect
    from vivace.evals.contest import contents_of
    from vivace.evals.spread_exam import Order, take

    with connect(address):
        order = Order(captions=len(exam.captions), contents=contents_of(source), **asked)
        answers, place = take(order, folder, workers=workers, on_pictures=on_pictures)
    return answers, load_reader(), place
