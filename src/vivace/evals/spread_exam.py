"""The built-in model's examination by a cluster's workers, batch by batch; what is on disk is not drawn again."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from vivace.cluster.spread import spread
from vivace.errors import InputError
from vivace.evals.builtin import BATCH, Answers, draw_exam, join, take_part
from vivace.evals.store import key_of

logger = logging.getLogger(__name__)

ORDER = "order.json"


@dataclass(frozen=True, kw_only=True)
class Order:
    """What every worker is told: everything that decides the answers."""

    captions: int
    contents: str  # fingerprint of the model's files
    steps: int
    seed: int
    call: Mapping[str, Any]
    device: str | None = None
    batch: int = BATCH  # captions drawn at once


def take(
    order: Order,
    folder: Path,
    *,
    workers: int | None = None,
    on_pictures: Callable[[int], None] = lambda done: None,
) -> tuple[Answers, dict[str, str]]:
    """The answers of a whole exam, drawn on the connected cluster, and the device and type they were drawn with.

    Each batch is kept in `folder` as soon as it is there. Raises InputError.
    """
    home = _home(order, folder)
    paths = {first: home / f"{first:06d}.safetensors" for first in range(0, order.captions, order.batch)}
    missing = [first for first, path in paths.items() if not path.is_file()]
    done = order.captions - sum(min(order.batch, order.captions - first) for first in missing)
    for first, (answers, place) in spread(partial(examiner, order), missing, workers=workers, called=_called):
        _keep(answers, paths[first], place=place)
        done += len(answers.verdicts)
        on_pictures(done)
    kept = [_read(path) for path in paths.values()]
    return join([answers for answers, _ in kept]), kept[0][1]


def _home(order: Order, folder: Path) -> Path:
    """The folder of this very order; what other orders left beside it stays, and what differs is said."""
    asked = json.loads(json.dumps(asdict(order), default=str))
    home = folder / f"exam-{key_of(asked)}"
    if not home.is_dir():
        for path in sorted(folder.glob(f"exam-*/{ORDER}")):
            kept = json.loads(path.read_text("utf-8"))
            other = [
                f"{name} ({kept.get(name)}, now {value})" for name, value in asked.items() if kept.get(name) != value
            ]
            logger.warning("%s was drawn with another %s; drawing anew", path.parent, ", ".join(other))
    try:
        home.mkdir(parents=True, exist_ok=True)
        (home / ORDER).write_text(json.dumps(asked, indent=1), encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write to {home}: {error.strerror}; choose another folder with -o") from error
    return home


def examiner(order: Order) -> Callable[[int], tuple[Answers, dict[str, str]]]:
    """In a worker: the model and its reader, loaded once, and what draws and reads one batch."""
    from vivace.builtin.reader import load_reader
    from vivace.load import load

    pipe = load("builtin", device=order.device)
    pipe.set_progress_bar_config(disable=True)
    reader = load_reader(device=pipe.device)
    exam = draw_exam(order.captions, seed=order.seed)

    def do(first: int) -> tuple[Answers, dict[str, str]]:
        asked = {"count": order.batch, "steps": order.steps, "seed": order.seed, **order.call}
        answers = take_part(exam, pipe, reader, first=first, **asked)
        return answers, {"device": str(pipe.device), "dtype": str(pipe.dtype).removeprefix("torch.")}

    return do


def _called(first: int) -> str:
    return f"the captions from {first} on"


def _keep(answers: Answers, path: Path, *, place: Mapping[str, str]) -> None:
    facts = {"verdicts": json.dumps(answers.verdicts), "seconds": repr(answers.seconds), "place": json.dumps(place)}
    part = path.with_suffix(f".{os.getpid()}")
    save_file({"features": answers.features.cpu().contiguous()}, part, metadata=facts)
    os.replace(part, path)


def _read(path: Path) -> tuple[Answers, dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        facts, features = file.metadata(), file.get_tensor("features")
    verdicts = tuple(json.loads(facts["verdicts"]))
    return Answers(verdicts=verdicts, features=features, seconds=float(facts["seconds"])), json.loads(facts["place"])
