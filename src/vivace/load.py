"""`load`: a stock diffusers pipeline, ready to run, from the built-in model, a folder, one file or a hub id."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vivace import builtin, checkpoint
from vivace.errors import InputError
from vivace.family import Family, UnknownFamilyError, Variant, family_of

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

DTYPES = {
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Beside model_index.json: the steps, guidance, width and height a model was made for.
DEFAULTS = "vivace.json"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model comes from and what can be known of it before its weights are read."""

    name: str  # as it was asked for
    path: Path | None  # a pipeline folder or one file; None for a hub id
    pipeline: str  # diffusers pipeline class name
    family: Family | None  # None where the class belongs to no recorded family
    variant: Variant | None = None  # the published model it is, where that can be told
    index: Mapping[str, Any] = field(default_factory=dict)  # of a folder: its model_index.json
    defaults: Mapping[str, Any] = field(default_factory=dict)  # steps, guidance, width, height


def load(
    model: str | os.PathLike[str] = "builtin",
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    variant: str | None = None,
) -> DiffusionPipeline:
    """A stock diffusers pipeline on its device.

    `model` is "builtin", a diffusers folder, an original-layout `.safetensors` file (SD 1.5, SDXL, FLUX), or a hub id.
    `dtype` defaults to bfloat16 on a GPU that has it, else float32; `device` to the GPU if there is one, else the CPU.
    `variant` names a weight variant of a folder or hub id ("fp16"), or the family's variant a single file is.
    Raises InputError for anything that is not such a model, before any weight is read.
    """
    return load_source(find(model, variant=variant), dtype=dtype, device=device, variant=variant)


def find(model: str | os.PathLike[str], *, variant: str | None = None) -> Source:
    """What `model` names, checked as far as it can be without reading weights. Raises InputError."""
    name = os.fspath(model)
    path = builtin.folder() if name == "builtin" else Path(name).expanduser()
    if path.is_dir():
        return _folder(name, path)
    if path.is_file():
        from vivace import single_file

        family, found = single_file.identify(path, variant=variant)
        return Source(name=name, path=path, pipeline=family.pipelines[0], family=family, variant=found)
    if path.is_absolute() or name.startswith((".", "~")) or name.endswith(tuple(checkpoint.PICKLES | {".safetensors"})):
        raise InputError(f"no model at {name}; give builtin, a pipeline folder, a .safetensors file or a hub id")
    if not HUB_ID.fullmatch(name):
        raise InputError(f"unknown model {name!r}; give builtin, a pipeline folder, a .safetensors file or a hub id (owner/name)")
    return _hub(name)


def _folder(name: str, path: Path) -> Source:
    index = _json(path / "model_index.json", f"{path} is not a pipeline folder: it has no model_index.json that can be read")
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str):
        raise InputError(f"{path} is not a pipeline folder: model_index.json names no pipeline class")
    components = [key for key, value in index.items() if isinstance(value, list) and value[:1] != [None]]
    checkpoint.check_folder(path, components=components)
    family = _family(pipeline)
    variant = _variant_of(path, family)
    defaults = _json(path / DEFAULTS, "") if (path / DEFAULTS).is_file() else {}
    return Source(
        name=name, path=path, pipeline=pipeline, family=family, variant=variant, index=index, defaults=defaults
    )


def _hub(name: str) -> Source:
    from huggingface_hub import hf_hub_download

    try:
        index = json.loads(Path(hf_hub_download(name, "model_index.json")).read_text("utf-8"))
    except (OSError, ValueError) as error:  # the hub's own errors are OSErrors or ValueErrors
        reason = str(error).strip().splitlines()[0][:160]
        raise InputError(
            f"no folder {name} here, and the hub gave no pipeline of that name ({reason}); check the name or the network"
        ) from error
    pipeline = index.get("_class_name", "")
    family = _family(pipeline)
    variants = family.variants.values() if family else ()
    variant = next((variant for variant in variants if variant.hub_id == name), None)
    return Source(name=name, path=None, pipeline=pipeline, family=family, variant=variant, index=index)


def _family(pipeline: str) -> Family | None:
    try:
        return family_of(pipeline)
    except UnknownFamilyError:
        return None


def _variant_of(path: Path, family: Family | None) -> Variant | None:
    """The published model a folder is, told by its denoiser's configuration; None for any other."""
    config = path / family.denoisers[0] / "config.json" if family else None
    if family is None or config is None or not config.is_file():
        return None
    found = _json(config, f"{config} cannot be read")
    plain = json.loads
    for variant in family.variants.values():
        facts = plain(json.dumps(dict(variant.denoiser)))  # tuples become lists, as in the file
        if facts and all(found.get(key) == value for key, value in facts.items()):
            return variant
    return None


def _json(path: Path, problem: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(problem) from error
    if not isinstance(value, dict):
        raise InputError(problem)
    return value
