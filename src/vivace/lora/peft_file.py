"""Files as PEFT itself writes them: layers named from `base_model.model.` on, alphas in a configuration beside them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key

from vivace.errors import InputError, first_line

logger = logging.getLogger(__name__)

PREFIX = "base_model.model."
CONFIG = "adapter_config.json"


def slot_of(names: Iterable[Any], slots: Mapping[str, torch.nn.Module]) -> str | None:
    """The component whose layers keys in this format name; None for keys in another, and where no component has one.

    Files of other trainers begin so too, and go on with the names of the model's own code.
    """
    layers = [name.removeprefix(PREFIX).partition(".lora_")[0] for name in names if str(name).startswith(PREFIX)]
    for slot, component in slots.items():
        there = {name.replace(".base_layer", "") for name, _ in component.named_modules()} if layers else set()
        if not there.isdisjoint(layers):
            return slot
    return None


def named(state: Mapping[str, torch.Tensor], *, slot: str, folder: Path | None = None) -> dict[str, torch.Tensor]:
    """Such keys as diffusers names the layers of `slot`, with the scales of the configuration in `folder` in them.

    Without one an alpha counts as much as its rank, which a warning says. Raises InputError for one that is no JSON.
    """
    config, made = _config(folder / CONFIG if folder else None), dict[str, torch.Tensor]()
    for key, value in state.items():
        layer, up, _ = key.partition(".lora_B.")
        weight = state.get(f"{layer}.lora_B.weight") if up and config else None
        name = layer.removeprefix(PREFIX)
        scale = 1.0 if weight is None or weight.ndim < 2 else _scale(config, name, weight.shape[1])
        made[f"{slot}.{key.removeprefix(PREFIX)}"] = value if scale == 1 else value.float() * scale
    return made


def _config(path: Path | None) -> dict[str, Any]:
    if path is None or not path.is_file():
        logger.warning("a LoRA in PEFT's format without %s: its alpha counts as much as its rank", CONFIG)
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}; fetch it again") from error


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key([*patterns], name), config.get("lora_alpha", rank))
    return alpha / ((rank**0.5 if config.get("use_rslora") else rank) or 1)
