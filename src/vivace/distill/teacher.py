"""The teacher's pipeline, as the config names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from vivace import hub
from vivace.distill.config import DistillConfig
from vivace.errors import InputError, first_line
from vivace.inputs import control_slot
from vivace.load import HUB_ID, find, load_source


def load_teacher(config: DistillConfig, *, device: torch.device) -> Any:
    """The pipeline of `config.teacher`, as `config.pipeline` with `config.control`. Raises InputError."""
    import diffusers

    source = find(config.teacher)
    name = config.pipeline or source.pipeline
    chosen: Any = getattr(diffusers, name, None)
    if chosen is None:
        raise InputError(f"no pipeline {name!r} in diffusers {diffusers.__version__}; check the key pipeline")
    most = max(stage.guidance[1] for stage in config.stages)
    if source.variant is not None and source.variant.guidance_kind == "none" and most > 1:
        raise InputError(f"{config.teacher} was made without guidance, and stages ask for {most:g}; give [1, 1]")
    slot = control_slot(chosen)
    if (slot is None) != (config.control is None):
        raise InputError(
            f"{name} takes {'no' if slot is None else 'a'} control model; check the keys pipeline and control"
        )
    precision = config.computes_in(device.type)
    components = {slot: _control(config.control, precision)} if slot and config.control else {}
    return load_source(source, dtype=precision, device=device, pipeline=chosen, **components)


def _control(name: str, precision: str) -> Any:
    """The ControlNet or T2I-Adapter in a folder or of a hub id, as its config.json names its class."""
    import diffusers

    folder = Path(name).expanduser()
    config = _control_config(name, folder)
    try:
        kind = json.loads(config.read_text("utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"control {name} has no config.json that names its class; give a ControlNet's folder"
        ) from error
    try:
        source, dtype = folder if folder.is_dir() else name, getattr(torch, precision)
        return getattr(diffusers, kind).from_pretrained(source, torch_dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise InputError(f"control {name} cannot be loaded: {first_line(error)}") from error


def _control_config(name: str, folder: Path) -> Path:
    """A control model's config.json, here or from the hub."""
    if folder.is_dir():
        return folder / "config.json"
    if folder.exists() or not HUB_ID.fullmatch(name):
        raise InputError(f"no folder {name} with a control model; check the key control, or give a hub id (owner/name)")
    try:
        return hub.fetch(name, "config.json")
    except InputError as error:
        raise InputError(
            f"no control model {name} here, and none from the hub ({error}); check the key control"
        ) from error
