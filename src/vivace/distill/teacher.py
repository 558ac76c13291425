"""The teacher's pipeline, as the config names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from vivace.distill.config import DistillConfig
from vivace.errors import InputError, first_line
from vivace.inputs import control_slot
from vivace.load import find, load_source


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
    import diffusers

    path = Path(name).expanduser()
    if path.is_dir():
        try:
            kind = json.loads((path / "config.json").read_text("utf-8"))["_class_name"]
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"control {path} has no config.json that names its class; give a ControlNet's folder"
            ) from error
    else:
        found: Any = diffusers.ControlNetModel.load_config(name)
        kind = found.get("_class_name", "ControlNetModel")
    try:
        dtype = getattr(torch, precision)
        return getattr(diffusers, kind).from_pretrained(name, torch_dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"control {name} cannot be loaded: {first_line(error)}") from error
