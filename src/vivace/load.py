"""`load`: a stock diffusers pipeline, ready to run, from the built-in model, a folder, one file or a hub id."""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vivace import builtin, checkpoint, hub
from vivace.config import resolve
from vivace.errors import InputError, first_line
from vivace.family import Family, Variant, known_family

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
# Beside model_index.json: the steps, guidance and size ([width, height]) a model was made for, and its longest side.
OWN = "vivace.json"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model comes from and what can be known of it before its weights are read."""

    name: str  # as it was asked for
    path: Path | None  # a pipeline folder or one file; None for a hub id
    pipeline: str  # diffusers pipeline class name
    family: Family | None  # None where the class belongs to no recorded family
    variant: Variant | None = None  # the published model it is, where that can be told
    index: Mapping[str, Any] = field(default_factory=dict)  # of a folder: its model_index.json
    own: Mapping[str, Any] = field(default_factory=dict)  # of a folder: its vivace.json
    denoiser: Mapping[str, Any] = field(default_factory=dict)  # its configuration, of a folder; else the variant's

    @property
    def size(self) -> tuple[int, int] | None:
        """The width and height in pixels it was made for, where that is known."""
        if "size" in self.own:
            return tuple(self.own["size"])
        return self.variant.size if self.variant else None

    @property
    def longest(self) -> int | None:
        """The longest side in pixels that it can make, where that is known."""
        return self.own.get("longest")

    @property
    def multiple(self) -> int:
        """What its pixel sizes are multiples of; 1 where that is not known."""
        own = self.variant.multiple if self.variant else None
        return own or (self.family.multiple if self.family else 1)

    @property
    def defaults(self) -> dict[str, Any]:
        """The steps and guidance it was made for, where they are known."""
        known = {name: self.own[name] for name in ("steps", "guidance") if name in self.own}
        if known or self.variant is None or self.family is None:
            return known
        guidance = {"guidance": self.variant.guidance} if "guidance" in self.family.takes else {}
        return {"steps": self.variant.steps, **guidance}

    @property
    def prediction(self) -> str:
        """What its denoiser predicts: epsilon, v or flow."""
        found = self.variant.prediction if self.variant else None
        return found or (self.family.prediction if self.family else "epsilon")


def load(
    model: str | os.PathLike[str] = "builtin",
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    variant: str | None = None,
    vram: str | None = None,
) -> DiffusionPipeline:
    """A stock diffusers pipeline on its device.

    `model` is "builtin", a diffusers folder, an original-layout `.safetensors` file (SD 1.5, SDXL, FLUX), or a hub id.
    `dtype` defaults to bfloat16 on a GPU that has it, else float32; `device` to the GPU if there is one, else the CPU.
    `variant` names a weight variant of a folder or hub id ("fp16"), or the family's variant a single file is.
    With `vram` ("24GB", "auto", a level's name) the weights are read on the host and placed from there as `accelerate`
    places them, so that nothing passes through a size that does not fit; whoever accelerates the pipeline further names
    the budget again. Raises InputError for anything that is not such a model, before any weight is read.
    """
    if vram is not None:
        from vivace.accelerate import accelerate

        config = resolve(vram=vram)
        place = resolve_device(device)
        number = resolve_dtype(dtype, place)
        pipe = load_source(find(model, variant=variant), dtype=number, device="cpu", variant=variant)
        return accelerate(pipe, config)
    return load_source(find(model, variant=variant), dtype=dtype, device=device, variant=variant)


def load_source(
    source: Source,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    variant: str | None = None,
    pipeline: type[Any] | None = None,
    **components: Any,
) -> DiffusionPipeline:
    """The pipeline of a found source, as its own class or as `pipeline`, with `components` in place of the model's own.

    Raises InputError for a device or dtype this machine lacks, and for weights that do not fit together.
    """
    place = resolve_device(device)
    number = resolve_dtype(dtype, place)
    chosen = pipeline or pipeline_class(source)
    try:
        if source.path is not None and source.path.is_file():
            from vivace import single_file

            if source.family is None or source.variant is None:
                raise InputError(f"{source.name} belongs to no family that is read from one file")
            known = {"family": source.family, "variant": source.variant}
            pipe = single_file.load(source.path, pipeline=chosen, dtype=number, **known, **components)
        else:
            absent = {
                key: None for key, value in source.index.items() if isinstance(value, list) and value[:1] == [None]
            }
            components = {**_quantised(source, device=place, dtype=number), **components}
            pipe = chosen.from_pretrained(
                source.path or source.name,
                torch_dtype=number,
                # A single file's variant names facts; a folder's names files.
                variant=variant,
                use_safetensors=True,
                local_files_only=source.path is not None,
                **{**absent, **components},
            )
    except InputError:
        raise
    # Of parts that do not fit each other, or hold what nobody expects, the libraries raise nearly anything.
    except Exception as error:
        raise InputError(f"{source.name} cannot be loaded as {chosen.__name__}: {first_line(error)}") from error
    return pipe.to(place)


def pipeline_class(source: Source) -> type[Any]:
    """The diffusers class that a source names. Raises InputError where there is none, or it is no pipeline."""
    import diffusers

    found = getattr(diffusers, source.pipeline, None)
    if found is None:
        raise InputError(f"{source.name} is a {source.pipeline}, which this diffusers ({diffusers.__version__}) lacks")
    if not (isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)):
        raise InputError(
            f"{source.name} names {source.pipeline} as its pipeline, which is none; check model_index.json"
        )
    return found


def _quantised(source: Source, *, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The denoisers that a folder holds quantised, read straight onto their device."""
    from vivace.quant import folder

    rooms = {name: source.path / name for name in source.index} if source.path else {}
    return {name: folder.read(room, device=device, dtype=dtype) for name, room in rooms.items() if folder.holds(room)}


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or the GPU if there is one, else the CPU. Raises InputError where it is not there."""
    import torch

    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device is None:
        return torch.device("cuda" if cuda else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"no device {device!r}; use cpu, cuda or cuda:N") from error
    if found.type == "cuda" and (found.index or 0) >= cuda:
        here = f"{cuda} CUDA devices; use cuda:N below {cuda}, or cpu" if cuda else "no GPU that torch can use; use cpu"
        raise InputError(f"no device {device}: this machine has {here}")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("no device mps on this machine; use --device cpu")
    if found.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"no device {device!r}; use cpu, cuda or cuda:N")
    return found


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype asked for, or bfloat16 on a GPU that computes in it, else float32. Raises InputError."""
    import torch

    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is None:
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    if dtype not in DTYPES:
        raise InputError(f"no dtype {dtype!r}; use {', '.join(DTYPES)}")
    return getattr(torch, DTYPES[dtype])


def find(model: str | os.PathLike[str], *, variant: str | None = None) -> Source:
    """What `model` names, checked as far as it can be without reading weights. Raises InputError."""
    name = os.fspath(model)
    if not name.strip():
        raise InputError("no model is named; give builtin, a pipeline folder, a .safetensors file or a hub id")
    path = builtin.folder() if name == "builtin" else Path(name).expanduser()
    # As os.path asks: a name too long for a file is one that no file has.
    if os.path.isdir(path):
        return _folder(name, path)
    if os.path.isfile(path):
        from vivace import single_file

        family, found = single_file.identify(path, variant=variant)
        pipeline = found.pipeline or family.pipelines[0]
        known = {"family": family, "variant": found, "denoiser": found.denoiser}
        return Source(name=name, path=path, pipeline=pipeline, **known)
    if path.is_absolute() or name.startswith((".", "~")) or name.endswith(tuple(checkpoint.PICKLES | {".safetensors"})):
        raise InputError(f"no model at {name}; give builtin, a pipeline folder, a .safetensors file or a hub id")
    if not HUB_ID.fullmatch(name):
        raise InputError(
            f"unknown model {name!r}; give builtin, a pipeline folder, a .safetensors file or a hub id (owner/name)"
        )
    return _hub(name)


def _folder(name: str, path: Path) -> Source:
    index = _json(
        path / "model_index.json", f"{path} is not a pipeline folder: it has no model_index.json that can be read"
    )
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str):
        raise InputError(f"{path} is not a pipeline folder: model_index.json names no pipeline class")
    components = [key for key, value in index.items() if isinstance(value, list) and value[:1] != [None]]
    checkpoint.check_folder(path, components=components)
    family = known_family(pipeline)
    _check_denoisers(path, family, index)
    denoiser = _denoiser_of(path, family)
    known = {"family": family, "variant": _variant_of(denoiser, family), "denoiser": denoiser}
    own = _own(path / OWN) if (path / OWN).is_file() else {}
    return Source(name=name, path=path, pipeline=pipeline, index=index, own=own, **known)


def _check_denoisers(path: Path, family: Family | None, index: Mapping[str, Any]) -> None:
    """Raises InputError where a pipeline's denoiser is another family's: it would fail in its first call."""
    for name in family.denoisers if family else ():
        _, kind = value if isinstance(value := index.get(name), list) and len(value) == 2 else (None, None)
        kin = known_family(kind) if isinstance(kind, str) else None
        if family and kin and kin.denoiser_class != family.denoiser_class:
            raise InputError(
                f"{path}: model_index.json names {index['_class_name']} as its pipeline and {kind}, a model of "
                f"{kin.name}, as its {name}; that pipeline runs a {family.denoiser_class}"
            )


def _own(path: Path) -> dict[str, Any]:
    """What a model's own file says it was made for. Raises InputError for a value of another kind."""
    own = _json(path, f"{path} cannot be read")
    for name, (fits, kind) in KINDS.items():
        if name in own and not fits(own[name]):
            raise InputError(f"{path}: {name} is {own[name]!r}; it has to be {kind}")
    return own


def _whole(value: Any) -> bool:
    return isinstance(value, int) and value >= 1


# Key of a model's own file -> whether a value is one for it, and what such values are.
KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "steps": (_whole, "a whole number from 1 on"),
    "longest": (_whole, "a whole number from 1 on"),
    "size": (
        lambda one: isinstance(one, list) and len(one) == 2 and all(map(_whole, one)),
        "[width, height] in pixels",
    ),
    "guidance": (lambda one: isinstance(one, int | float) and one >= 0, "a number from 0 on"),
}


def _hub(name: str) -> Source:
    try:
        path = hub.fetch(name, "model_index.json")
    except InputError as error:
        raise InputError(f"no folder {name} here, and none from the hub ({error}); check name and network") from error
    index = _json(path, f"{name} is not a pipeline on the hub: its model_index.json cannot be read")
    pipeline = index.get("_class_name", "")
    family = known_family(pipeline)
    variants = family.variants.values() if family else ()
    variant = next((variant for variant in variants if variant.hub_id == name), None)
    known = {"family": family, "variant": variant, "denoiser": variant.denoiser if variant else {}}
    return Source(name=name, path=None, pipeline=pipeline, index=index, **known)


def _denoiser_of(path: Path, family: Family | None) -> dict[str, Any]:
    """The configuration of a folder's denoiser; empty where there is none."""
    config = path / family.denoisers[0] / "config.json" if family else None
    return _json(config, f"{config} cannot be read") if config and config.is_file() else {}


def _variant_of(found: Mapping[str, Any], family: Family | None) -> Variant | None:
    """The published model that a denoiser's configuration is of; None for any other."""
    for variant in family.variants.values() if family and found else ():
        facts = json.loads(json.dumps(dict(variant.denoiser)))  # tuples become lists, as in the file
        same = all(found.get(key) == value for key, value in facts.items())
        if family and same and _by_default(family, found, but=facts):
            return variant
    return None


def _by_default(family: Family, config: Mapping[str, Any], *, but: Mapping[str, Any]) -> bool:
    """Whether what a configuration says beyond the facts `but` are the defaults of the denoiser's class."""
    import diffusers

    parameters = inspect.signature(getattr(diffusers, family.denoiser_class)).parameters
    said = {name: value for name, value in config.items() if name in parameters and name not in but}
    return all(json.loads(json.dumps(parameters[name].default)) == value for name, value in said.items())


def _json(path: Path, problem: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(problem) from error
    if not isinstance(value, dict):
        raise InputError(problem)
    return value
