"""What the verbs that measure share: the prompts, steps, guidance and size they run with, and how figures are shown."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vivace.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from vivace.load import Source

WIDE = 200
"""Columns of a table that goes into a pipe or file, which has no width to keep to."""


def settings_of(source: Source, *, steps: int | None, guidance: float | None, seed: int) -> dict[str, Any]:
    """Steps and guidance as given or as the model's own. Raises InputError for what cannot be, a seed too."""
    from vivace.generation.job import SEEDS

    if not 0 <= seed < SEEDS:
        raise InputError(f"--seed must be from 0 to {SEEDS - 1}, got {seed}")
    if steps is not None and steps < 1:
        raise InputError(f"--steps must be 1 or more, got {steps}")
    # Written so that NaN fails too.
    if guidance is not None and not 0 <= guidance <= 1000:
        raise InputError(f"--guidance must be from 0 to 1000, got {guidance}")
    given = {"steps": steps, "guidance": guidance}
    return {"steps": 28, **source.defaults, **{name: value for name, value in given.items() if value is not None}}


def call_of(source: Source, settings: dict[str, Any], *, size: str | None, frames: int | None = None) -> dict[str, Any]:
    """The arguments of the pipeline's call that say guidance, size and frames, as given or as the model's own.

    Raises InputError for what the model is known not to make.
    """
    from vivace.cli.generate import read_size
    from vivace.generation.job import frames_problem, size_problem

    asked = read_size(size) if size else None
    if asked and (problem := size_problem(asked, source)):
        raise InputError(f"--size {problem}")
    if frames is not None:
        if source.family is None or source.family.media != "video":
            raise InputError(f"--frames is for videos, which {source.name} is not known to make; leave it out")
        if problem := f"must be 1 or more, got {frames}" if frames < 1 else frames_problem(frames, source):
            raise InputError(f"--frames {problem}")
    width, height = asked or source.size or (None, None)
    named = {"guidance_scale": settings.get("guidance"), "width": width, "height": height, "num_frames": frames}
    return {name: value for name, value in named.items() if value is not None}


def prompts_of(path: Path | None, *, builtin: bool, captions: int, seed: int) -> tuple[str, ...]:
    """The prompts in a file, or captions of the built-in model's world. Raises InputError where there are neither."""
    from vivace.generation.prompt import read_prompts

    if path is not None:
        return read_prompts(path)
    if not builtin:
        raise InputError("--prompts is needed: a file with one prompt a line, of the kind the model will be used with")
    from vivace.evals.builtin import draw_exam

    # Not the captions that `vivace eval` draws from the same seed: those judge.
    return draw_exam(captions, seed=seed + 1000).captions


def check_writable(path: Path, *, option: str) -> None:
    """Raises InputError where a file cannot be written, before minutes are spent on what goes into it."""
    if path.is_dir():
        raise InputError(f"{option} {path} cannot be written: it is a folder; name a file")
    try:
        # Tried, not asked: permission bits say nothing of read-only file systems.
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise InputError(f"{option} {path} cannot be written: {reason}; name a file in a folder of yours") from error


def check_folder(path: Path, *, option: str) -> None:
    """Raises InputError where a folder cannot be written into, or made; makes nothing."""
    there = next(room for room in (path, *path.absolute().parents) if room.exists())
    if not there.is_dir():
        raise InputError(f"{option} {path} cannot be a folder: {there} is a file; name another")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise InputError(f"{option} {path} cannot be written: {reason}; name a folder of yours") from error


def show(table: Table) -> None:
    """Print a table: names whole, on a terminal within its width."""
    from rich.console import Console

    console = Console()
    for column in table.columns:
        column.overflow = "fold"
    if not console.is_terminal:
        console.width = WIDE
    console.print(table)


@contextmanager
def status() -> Iterator[Callable[[str], None]]:
    """Says on a terminal what is being done; elsewhere nothing."""
    from rich.console import Console

    if not sys.stderr.isatty():
        yield lambda line: None
        return
    with Console(stderr=True).status("loading") as shown:
        yield shown.update
