"""`train`: the loop around the batches, with its checkpoints, logs, grids and ways to stop."""

from __future__ import annotations

import gc
import logging
import math
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError

from vivace.distill import checkpoint
from vivace.distill.activations import room_of, settle
from vivace.distill.actors import blank_item, make_actors
from vivace.distill.config import DistillConfig
from vivace.distill.data import sizes_of, source_of, supply_of
from vivace.distill.grid import draw_conditioned, draw_grid, first_item
from vivace.distill.result import write_result
from vivace.distill.teacher import load_teacher
from vivace.distill.training import Training
from vivace.distill.weights import state_of
from vivace.errors import InputError, install

logger = logging.getLogger(__name__)

# What may change between a run and its resumption, because no weight depends on it.
FREE = {
    "": frozenset({"output", "records"}),
    "data": frozenset({"workers", "cache"}),
    "student": frozenset({"gradient_checkpointing"}),
}


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a training stands after a batch."""

    done: int
    batches: int
    stage: int
    losses: Mapping[str, float]
    seconds: float  # of this batch


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a training did."""

    done: int
    stopped: bool  # by a signal, before its end
    signal: int | None = None  # which one
    folder: Path | None  # the result; None where it was stopped
    checkpoint: Path
    losses: Mapping[str, float]
    skipped: Mapping[str, int]  # samples left out, by reason, in all processes


def train(
    config: DistillConfig,
    *,
    pipe: Any = None,
    resume: bool = True,
    on_batch: Callable[[Progress], None] | None = None,
) -> Result:
    """Distil as `config` says; the result lies in `output`/result.

    `pipe` is a teacher pipeline at hand, in place of loading `config.teacher`. With `resume` it goes on from the newest
    whole checkpoint in `output`. SIGTERM and SIGINT end it after the batch that runs, with a checkpoint. Raises
    InputError for what cannot be done, and for a loss that is not finite: the last good checkpoint then stays.
    """
    output = Path(config.output).expanduser()
    accelerator = make_accelerator(config, output)
    found = checkpoint.latest(output) if resume else None
    if found is None and checkpoint.checkpoints(output):
        held = "no checkpoint that is whole; mend one" if resume else "checkpoints of another run; resume it"
        raise InputError(f"{output} holds {held}, or give another output")
    training = make_training(config, accelerator, pipe=pipe)
    if found is not None:
        _resume(training, found)
    if accelerator.is_main_process:
        make_folder(output)
        checkpoint.sweep(output)
    accelerator.init_trackers("logs")
    try:
        with _signals() as stop, _settled():
            return _loop(training, output, stop=stop, on_batch=on_batch)
    finally:
        try:
            # Not end_training: it ends the processes' group too, which whoever trains again has need of.
            for tracker in accelerator.trackers:
                tracker.finish()
        except OSError as error:  # of a log; what else went wrong is told already
            logger.warning("the end of the log cannot be written (%s)", error.strerror)


def make_folder(folder: Path) -> None:
    """Make a folder with those above it. Raises InputError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be made a folder ({error.strerror}); give another one") from error


def make_accelerator(config: DistillConfig, output: Path) -> Accelerator:
    """accelerate's view of the processes and the precision. Raises InputError for a tracker that is not installed."""
    asked = list(config.records.trackers)
    try:
        # The precision is ours to apply: the student's forwards are cast, the frozen teacher is in it already.
        made = Accelerator(
            mixed_precision="no",
            cpu=not torch.accelerator.is_available(),
            log_with=[*asked] or None,
            project_dir=output,
        )
    except (ValueError, ImportError) as error:
        raise InputError(f"trackers {asked} cannot be had ({error}); {install('train')}") from error
    # accelerate leaves out in silence what it knows and does not find.
    missing = sorted({*asked} - {str(getattr(one, "value", one)) for one in made.log_with} - {"all"})
    if missing:
        how = install("train") if missing[0] == "tensorboard" else f"pip install {missing[0]}"
        raise InputError(f"records.trackers has {missing[0]}, which is not installed; {how}, or leave it out")
    return made


def make_training(config: DistillConfig, accelerator: Accelerator, *, pipe: Any = None) -> Training:
    """A training at its beginning. Raises InputError for what `config` asks and the teacher cannot do."""
    source = source_of(config)
    pipe = load_teacher(config, device=accelerator.device) if pipe is None else pipe.to(accelerator.device)
    actors = make_actors(config, pipe)
    supply = supply_of(
        config,
        multiple=actors.family.multiple,
        source=source,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        device=str(accelerator.device),
    )
    training = Training(actors, supply, accelerator)
    if config.student.gradient_checkpointing == "auto":
        largest = max(sizes_of(config, multiple=actors.family.multiple), key=math.prod)
        settle(training, blank_item(actors, largest), room=room_of(training))
    return training


def _loop(training: Training, output: Path, *, stop: list[int], on_batch: Callable[[Progress], None] | None) -> Result:
    config = training.config
    losses: Mapping[str, float] = {}
    while training.done < config.batches and not _stopping(training, stop):
        number, start = training.stage_number, time.perf_counter()
        losses = training.batch()
        _check_finite(losses, training.done, output)
        seconds = time.perf_counter() - start
        _log(training, losses, output)
        every = config.records.sample_every if config.records.prompts or config.conditioners else 0
        if every and training.done % every == 0:
            _draw(training, output / "samples" / f"{training.done:08d}.png")
        if training.done % config.records.save_every == 0 or training.done == config.batches:
            _save(training, output)
        if on_batch is not None:
            on_batch(Progress(done=training.done, batches=config.batches, stage=number, losses=losses, seconds=seconds))
    stopped = training.done < config.batches
    saved = checkpoint.path_of(output, training.done)
    # One that is whole is this very one: to write it again would be to remove it first.
    if stopped and checkpoint.broken(saved):
        _save(training, output)
    folder = None if stopped else _finish(training, output)
    skipped = sum(map(Counter, gather_object([getattr(training.supply, "skipped", {})])), Counter[str]())
    return Result(
        done=training.done,
        stopped=stopped,
        # Of several processes another one may have been told.
        signal=(stop[0] if stop else int(signal.SIGTERM)) if stopped else None,
        folder=folder,
        checkpoint=saved,
        losses=losses,
        skipped=dict(skipped),
    )


def _log(training: Training, losses: Mapping[str, float], output: Path) -> None:
    """The losses to the trackers. Raises InputError where they cannot write: nor could a checkpoint."""
    try:
        training.accelerator.log({f"loss/{name}": value for name, value in losses.items()}, step=training.done)
    except OSError as error:
        raise InputError(
            f"the log of batch {training.done} cannot be written ({error.strerror}); {_left(output)}; "
            "make room and start again"
        ) from error


def _check_finite(losses: Mapping[str, float], done: int, output: Path) -> None:
    wrong = [name for name, value in losses.items() if not math.isfinite(value)]
    if wrong:
        raise InputError(
            f"the {wrong[0]} loss of batch {done + 1} is {losses[wrong[0]]}; {_left(output)}; lower lr or its weight"
        )


def _left(output: Path) -> str:
    """What there is to go on from."""
    good = checkpoint.latest(output)
    return f"the last good checkpoint is {good}" if good else "no checkpoint was written yet"


def _stopping(training: Training, stop: list[int]) -> bool:
    """Whether any process was told to stop: all have to end after the same batch."""
    if training.accelerator.num_processes == 1:
        return bool(stop)
    flag = torch.tensor(float(bool(stop)), device=training.accelerator.device)
    told: Any = training.accelerator.reduce(flag, reduction="sum")
    return bool(told.item())


def _save(training: Training, output: Path) -> None:
    """A checkpoint, written by the first process. Raises InputError for what is no longer finite."""
    accelerator = training.accelerator
    tensors = training.tensors()
    # The losses are of the weights before the step: what it made of them nothing has seen yet.
    for name, entries in tensors.items():
        if not all(bool(value.isfinite().all()) for value in entries.values()):
            raise InputError(
                f"after batch {training.done} the values of {name} are not finite; {_left(output)}; lower lr"
            )
    data = gather_object([training.supply.state()])
    if accelerator.is_main_process:
        state = {
            "done": training.done,
            "stage": training.stage_number,
            "processes": accelerator.num_processes,
            "data": data,
            "config": training.config.to_dict(),
        }
        checkpoint.save(output, training.done, tensors=tensors, state=state, keep=training.config.records.keep)
    accelerator.wait_for_everyone()


def _resume(training: Training, path: Path) -> None:
    tensors, state = checkpoint.load(path)
    changed = differences(state["config"], training.config.to_dict())
    if changed:
        raise InputError(f"{path} was made with another config: {'; '.join(changed)}; put it back, or another output")
    count = training.accelerator.num_processes
    if state["processes"] != count:
        raise InputError(f"{path} was made by {state['processes']} processes, and this is {count}; start as many")
    training.load(tensors, done=state["done"])
    training.supply.load(state["data"][training.accelerator.process_index])
    logger.info("resumed from %s", path)


def differences(before: Any, now: Any, *, where: str = "") -> list[str]:
    """What of two configs differs, as `key: before -> now`, less what may change."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        dot, free = where and f"{where}.", FREE.get(where, frozenset())
        names = sorted({*before, *now} - free)
        return [said for name in names for said in differences(before.get(name), now.get(name), where=f"{dot}{name}")]
    lists = isinstance(before, list) and isinstance(now, list)
    if lists and any(isinstance(one, Mapping) for one in (*before, *now)):
        if len(before) != len(now):
            return [f"{where}: {len(before)} of them -> {len(now)}"]
        pairs = enumerate(zip(before, now, strict=True))
        return [said for index, pair in pairs for said in differences(*pair, where=f"{where}[{index}]")]
    return [] if before == now else [f"{where}: {before} -> {now}"]


def _draw(training: Training, path: Path) -> None:
    """A sample grid. Every process draws it, as each may hold a shard of the student; the first one writes."""
    actors, count = training.actors, training.accelerator
    with training.mean.inside(training.plain) if training.mean else nullcontext():
        if training.config.conditioners:
            training.shown = training.shown or first_item(actors, rank=count.process_index, world=count.num_processes)
            sheet = draw_conditioned(actors, training.cast(training.plain), training.shown)
        else:
            sheet = draw_grid(actors.pipe, training.plain, training.config, slot=actors.family.denoisers[0])
    if training.accelerator.is_main_process:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            sheet.save(path)
        except OSError as error:
            raise InputError(f"{path} cannot be written ({error}); make room and start again") from error


def _finish(training: Training, output: Path) -> Path:
    """The result, of the running mean where there is one."""
    actors, student = training.actors, training.plain
    with training.mean.inside(student) if training.mean else nullcontext():
        weights = state_of(student)
    if training.accelerator.is_main_process:
        slot = actors.family.denoisers[0]
        try:
            write_result(student, weights, actors.pipe, training.config, output / "result", slot=slot)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"the result cannot be written ({error}); {_left(output)}; make room and start again"
            ) from error
    training.accelerator.wait_for_everyone()
    return output / "result"


@contextmanager
def _settled() -> Iterator[None]:
    """Python's collector leaves alone what is there already: to go through it, again and again, takes tenths of a
    second of a host that a GPU waits for.
    """
    own = gc.get_freeze_count() == 0
    if own:
        gc.collect()
        gc.freeze()
    try:
        yield
    finally:
        if own:
            gc.unfreeze()


@contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that fills when SIGTERM or SIGINT comes; outside the main thread nothing can be caught."""
    seen: list[int] = []

    def note(number: int, _: Any) -> None:
        seen.append(number)

    before = {}
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, note)
    except ValueError:
        logger.warning("signals are not caught outside the main thread; stop by ending the process")
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
