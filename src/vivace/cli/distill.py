"""`vivace distill`: a few-step student of any conditional diffusion model."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vivace.errors import InputError

if TYPE_CHECKING:
    from vivace.distill.plan import Plan
    from vivace.distill.trainer import Progress, Result

GIB = 2**30
BATCHES = 1000  # of a cache
EVERY = 60.0  # seconds between lines where there is no terminal for a bar


def distill(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or a ready one: builtin, sdxl, ...")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder, in place of the config's.")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a key: student.rank=16; repeatable.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Measure plan, memory and time; write nothing (but fetch shards by URL).")
    ] = False,
    precache: Annotated[
        Path | None, typer.Option(help="Only write latents and prompt embeddings of the data to this folder.")
    ] = None,
    batches: Annotated[int | None, typer.Option(min=1, help=f"With --precache: how many batches ({BATCHES}).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
) -> None:
    """Distil a model to a few steps. A stopped training goes on when it is started again."""
    from vivace.distill.reading import read_config

    if dry_run and precache is not None:
        raise InputError("--dry-run writes nothing and --precache writes a cache; give one of them")
    if batches is not None and precache is None:
        raise InputError(
            "--batches is the length of a --precache; a training's is in its stages (--set stages[0].batches=)"
        )
    fields = {"output": str(output)} if output else {}
    chosen = read_config(config, assignments=tuple(assignments or ()), **fields)

    from vivace.cli.generate import quiet

    ended = None
    with quiet():
        if dry_run:
            from vivace.distill.plan import make_plan

            plan = make_plan(chosen)
            if _tells():
                print(json.dumps(plan.to_dict())) if as_json else _print_plan(plan)
        elif precache is not None:
            _precache(chosen, precache, batches=batches or BATCHES, as_json=as_json)
        else:
            ended = _train(chosen, as_json=as_json)
    _part()
    if ended is not None:
        # As a process that the signal ended: what started it then knows that there is more to do.
        raise typer.Exit(128 + ended)


def _part() -> None:
    """Leave the other processes; where something went wrong they may wait for this one, and its end tells them."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _tells() -> bool:
    """Whether this process is the one of several (torchrun) that prints."""
    return os.environ.get("RANK", "0") == "0"


def _precache(config: Any, folder: Path, *, batches: int, as_json: bool) -> None:
    from vivace.distill.precache import write_cache

    with _bar(batches, "writing") as tell:
        count = write_cache(config, folder, batches=batches, on_batch=lambda done: tell(done, ""))
    if not _tells():
        return
    if as_json:
        print(json.dumps({"folder": str(folder), "batches": count}))
        return
    print(f"{folder}: {count} batches; train on them with --set data.kind=cached --set data.path={folder}")


def _train(config: Any, *, as_json: bool) -> int | None:
    """The signal that ended the training, or None."""
    from vivace.distill.trainer import train

    with _bar(config.batches, "training") as tell:

        def on_batch(progress: Progress) -> None:
            shown = " ".join(f"{name[:4]} {value:.3g}" for name, value in progress.losses.items() if value)
            tell(progress.done, f"stage {progress.stage + 1} {shown}")

        result = train(config, on_batch=on_batch)
    if _tells():
        _print_result(result, batches=config.batches, as_json=as_json)
    return result.signal


def _print_result(result: Result, *, batches: int, as_json: bool) -> None:
    if as_json:
        print(json.dumps({**vars(result), "folder": str(result.folder or ""), "checkpoint": str(result.checkpoint)}))
        return
    if result.skipped:
        print(
            "left out, in all epochs: " + ", ".join(f"{reason} ({count})" for reason, count in result.skipped.items())
        )
    if result.stopped:
        print(f"stopped after {result.done} of {batches} batches; {result.checkpoint} goes on from there")
    else:
        print(f"{result.folder}  ({result.done} batches)")


def _print_plan(plan: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("stage", "batches", "K", "teacher calls", "s a batch", "rollout", "pictures/s", "hours")
    for number, stage in enumerate(plan.stages, start=1):
        row = [stage.batches, stage.steps, f"{stage.teacher_calls:.1f}", f"{stage.seconds:.3g}", f"{stage.rollout:.0%}"]
        row += [f"{stage.pictures_per_second:.3g}", f"{stage.batches * stage.seconds / 3600:.2f}"]
        table.add_row(str(number), *map(str, row))
    console = Console()
    console.print(table)
    for name, size in plan.memory.items():
        console.print(f"{name:40} {size / GIB:8.3f} GiB")
    if plan.peak is not None:
        console.print(f"{'most that was allocated':40} {plan.peak / GIB:8.3f} GiB")
    count = f"{plan.processes} x " if plan.processes > 1 else ""
    console.print(f"in all {plan.hours:.2f} hours on {count}{plan.device}, without samples and checkpoints")


@contextmanager
def _bar(total: int, name: str) -> Iterator[Callable[[int, str], None]]:
    """How far a long work is, with the time left: a bar on a terminal, else a line a minute on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if not sys.stderr.isatty():
        yield _lines(total, name)
        return
    columns: Sequence[Any] = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not _tells()) as progress:
        task = progress.add_task(name, total=total)

        def tell(done: int, text: str) -> None:
            progress.update(task, completed=done, description=f"{name} {text}".strip())

        yield tell


def _lines(total: int, name: str) -> Callable[[int, str], None]:
    """The same as lines, for a log that is read later."""
    begun: list[tuple[float, int]] = []  # when, and what was done by then: a training may have been resumed
    told = 0.0

    def tell(done: int, text: str) -> None:
        nonlocal told
        now = time.monotonic()
        if not begun:
            begun.append((now, done))
            told = now
        if now - told < EVERY or not _tells():
            return
        told = now
        start, before = begun[0]
        left = timedelta(seconds=round((total - done) * (now - start) / max(1, done - before)))
        print(f"{name} {done} of {total}, {left} left {text}".strip(), file=sys.stderr, flush=True)

    return tell
