"""Bytes of a model's components, known before any weight is read: from its files' headers, or its family's facts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vivace import checkpoint
from vivace.errors import InputError
from vivace.family import Family, Variant
from vivace.load import Source

if TYPE_CHECKING:
    import torch

CONFIG = "config.json"


@dataclass(frozen=True, kw_only=True)
class Component:
    """One part of a pipeline that has weights."""

    name: str  # its slot in the pipeline
    parameters: int
    nbytes: int  # as loaded


def components_of(source: Source, *, dtype: torch.dtype) -> dict[str, Component]:
    """The components of a model, loaded as `dtype`, the denoiser first.

    A folder's are counted in its files, whatever type they are stored in, but for layers that are in few bits; any
    other model's come from the facts of its family. Raises InputError where there are neither.
    """
    from vivace.quant import folder

    few_bits = {}
    if source.path is not None and source.path.is_dir():
        rooms = {room: source.path / room for room in _rooms(source)}
        counts = {name: _stored(room) for name, room in rooms.items()}
        few_bits = {name: folder.nbytes(room, dtype=dtype) for name, room in rooms.items() if folder.holds(room)}
    elif source.family is not None and source.variant is not None:
        counts = {
            name: sum(parameter.numel() for parameter in module.parameters())
            for name, module in skeletons(source, dtype=dtype).items()
        }
    else:
        raise InputError(
            f"nothing is known of the sizes in {source.name}; give a local folder or a known model (vivace families)"
        )
    return {
        name: Component(name=name, parameters=count, nbytes=few_bits.get(name, count * dtype.itemsize))
        for name, count in counts.items()
        if count
    }


def skeletons(source: Source, *, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    """Every component that is known well enough, on the "meta" device: shapes without weights, the denoiser first."""
    if source.path is None or not source.path.is_dir():
        return _published(source.family, source.variant, dtype=dtype) if source.family and source.variant else {}
    built = {room: _built(source.path / room, source.index.get(room), dtype=dtype) for room in _rooms(source)}
    return {name: module for name, module in built.items() if module is not None}


def _published(family: Family, variant: Variant, *, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    """The components of a published model on the "meta" device."""
    from vivace.families.build import full_component

    names = (*family.denoisers[: variant.experts], "vae", *{**family.text_encoders, **variant.text_encoders})
    return {name: full_component(family, variant, name, device="meta", dtype=dtype) for name in names}


def _rooms(source: Source) -> list[str]:
    """The folder's components that have weights, the denoisers first."""
    assert source.path is not None
    rooms = [room for room in source.index if any((source.path / room).glob("*.safetensors"))]
    first = source.family.denoisers if source.family else ("transformer", "unet", "prior")
    return sorted(rooms, key=lambda room: room not in first)


def _stored(room: Path) -> int:
    """Parameters in a component's files. Weight variants hold the same tensors, which count once."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in room.glob("*.safetensors"):
        shapes |= {name: tensor.shape for name, tensor in checkpoint.header(file).items()}
    return sum(map(prod, shapes.values()))


def _built(room: Path, entry: Any, *, dtype: torch.dtype) -> torch.nn.Module | None:
    """A component of diffusers or a text encoder of transformers from its configuration, without weights, or None."""
    import diffusers
    import torch
    import transformers

    library, name = entry
    if not (room / CONFIG).is_file():
        return None
    config: Mapping[str, Any] = json.loads((room / CONFIG).read_text("utf-8"))
    with torch.device("meta"):
        if library == "diffusers":
            return getattr(diffusers, name).from_config(config).to(dtype).eval()
        if library == "transformers" and room.name.startswith("text_encoder"):
            kind = getattr(transformers, name)
            return kind(kind.config_class.from_dict(dict(config))).to(dtype).eval()
    return None
