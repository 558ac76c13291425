"""Latents and prompt embeddings, computed once and kept on disk: training then runs neither VAE nor text encoders."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from vivace.distill.config import DistillConfig, Records
from vivace.distill.data.cached import check_made, made_of, write_item
from vivace.distill.objective import Item
from vivace.distill.trainer import make_accelerator, make_folder, make_training
from vivace.errors import InputError


def write_cache(
    config: DistillConfig,
    folder: Path,
    *,
    batches: int,
    pipe: Any = None,
    on_batch: Callable[[int], None] | None = None,
) -> int:
    """Write `batches` batches of the config's data to `folder`; returns how many lie there.

    Every process writes its share. What is there already is kept, and written past. Raises InputError.
    """
    if config.data.kind == "cached":
        raise InputError("data.kind is cached already; give the shards or the folder that it is to be made of")
    make_folder(folder)
    config = dataclasses.replace(config, accelerate=None, records=Records(trackers=()))
    accelerator = make_accelerator(config, folder)
    training = make_training(config, accelerator, pipe=pipe)
    made = made_of(config, device=accelerator.device.type)
    rank, world = accelerator.process_index, accelerator.num_processes
    for number in range(rank, batches, world):
        path = folder / f"{number:08d}.safetensors"
        if path.exists():
            check_made(path, made)
            # Passed over, so that the others come out as they would have.
            next(training.supply)
        else:
            _write(training.draw()[1], path, made)
        training.done += 1
        if on_batch is not None:
            on_batch(number + 1)
    accelerator.wait_for_everyone()
    return len(list(folder.glob("*.safetensors")))


def _write(item: Item, path: Path, made: Mapping[str, Any]) -> None:
    """A batch's file, whole or not there."""
    temporary = path.with_suffix(".part")
    try:
        write_item(item, temporary, made=made)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink()
        raise InputError(
            f"{path} cannot be written ({error}); make room and start again, what is there stays"
        ) from error
