"""Checkpoints that are whole or not there: written aside, flushed, listed with hashes, renamed; old ones go after."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vivace.errors import InputError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "state.json"
PREFIX = "step-"


def save(
    folder: Path, number: int, *, tensors: Mapping[str, Mapping[str, torch.Tensor]], state: Mapping[str, Any], keep: int
) -> Path:
    """Write checkpoint `number`: a safetensors file for each entry of `tensors`, and `state` as JSON.

    Until the rename nothing of it is seen; a disk that is full, or a kill at any moment, leaves the older ones as they
    are. Raises InputError where it cannot be written.
    """
    target = path_of(folder, number)
    temporary = folder / f".{target.name}.{uuid.uuid4().hex}"
    try:
        temporary.mkdir(parents=True)
        for name, entries in tensors.items():
            save_file(
                {key: value.detach().cpu().contiguous() for key, value in entries.items()},
                temporary / f"{name}.safetensors",
            )
        (temporary / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        listed = {file.name: _facts(file) for file in sorted(temporary.iterdir())}
        # Last, so that a folder with a manifest has everything that the manifest lists.
        (temporary / MANIFEST).write_text(json.dumps(listed, indent=1), encoding="utf-8")
        for file in temporary.iterdir():
            flush(file)
        flush(temporary)
        if target.exists():  # a broken one
            shutil.rmtree(target)
        os.replace(temporary, target)
        flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        good = latest(folder)
        left = f"the last good one is {good}" if good else "there is no older one"
        raise InputError(
            f"checkpoint {number} cannot be written ({error}); {left}; make room and start again"
        ) from error
    # A later one is there only where it is broken, and stands for none that is to be kept.
    for old in [path for path in checkpoints(folder) if path.name <= target.name][:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def path_of(folder: Path, number: int) -> Path:
    """Where checkpoint `number` lies."""
    return folder / f"{PREFIX}{number:08d}"


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first, whole or not."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if path.is_dir())


def latest(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; broken ones are named in the log."""
    for path in reversed(checkpoints(folder)):
        if (problem := broken(path)) is None:
            return path
        logger.warning("checkpoint %s is left aside: %s", path, problem)
    return None


def broken(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        listed = json.loads((path / MANIFEST).read_text("utf-8"))
        return next((f"{name} is not what was written" for name in listed if _facts(path / name) != listed[name]), None)
    except (OSError, ValueError, AttributeError):
        return "its manifest, or a file of it, cannot be read"


def load(
    path: Path, *, device: str | torch.device = "cpu"
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """The tensors and the state of a checkpoint."""
    tensors = {file.stem: load_file(file, device=str(device)) for file in sorted(path.glob("*.safetensors"))}
    return tensors, json.loads((path / STATE).read_text("utf-8"))


def sweep(folder: Path) -> None:
    """Remove what killed saves left behind."""
    for path in folder.glob(f".{PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)


def _facts(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def flush(path: Path) -> None:
    """Have a file, or a folder's list of names, on the disk before what follows."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
