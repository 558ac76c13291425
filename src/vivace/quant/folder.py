"""A pipeline folder whose denoiser is stored quantised: `quantised.safetensors`, and `quantised.json` beside it.

Everything else in it is as `save_pretrained` writes it. Stock diffusers finds no weights for the denoiser there and
says so; `vivace.load` reads it at its small size.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vivace import checkpoint
from vivace.errors import InputError, first_line
from vivace.load import OWN
from vivace.quant import format_of
from vivace.quant.layers import linears
from vivace.quant.linear import QuantLinear

WEIGHTS, RECORD, CONFIG = "quantised.safetensors", "quantised.json", "config.json"
PART = ".part"  # in a folder: what is not complete yet
VERSION = 3
STORED = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}
"""The types in such a file, as its header names them."""
PIECE = 64 * 2**20
"""Bytes that are hashed in one go; pieces are hashed side by side, so that checking keeps up with reading."""
ALIGNED = 64
"""Bytes to whose multiples torch aligns what it makes on the CPU."""


def write(
    pipe: Any, folder: Path, *, denoisers: dict[str, torch.nn.Module], own: Mapping[str, Any] | None = None
) -> None:
    """Write `pipe`, whose `denoisers` are quantised, into `folder`, in the place of what an earlier call left there.

    `own` is what the model was made for, as its `vivace.json` says. What was there stays until all is written. Raises
    InputError where that fails, and for a folder of other things.
    """
    check_replaceable(folder)
    part, fresh = folder / PART, not folder.exists()
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        _write(pipe, part, denoisers=denoisers)
        if own:
            (part / OWN).write_text(json.dumps(dict(own)) + "\n", encoding="utf-8")
        for old in folder.iterdir():
            if old.name != PART:
                shutil.rmtree(old) if old.is_dir() else old.unlink()
        for made in part.iterdir():
            made.rename(folder / made.name)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be written: {first_line(error)}; name a folder elsewhere") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if fresh:
            with suppress(OSError):
                folder.rmdir()  # which only an empty one allows


def _write(pipe: Any, folder: Path, *, denoisers: dict[str, torch.nn.Module]) -> None:
    pipe.save_config(folder)
    for name, component in pipe.components.items():
        if name in denoisers:
            _write_denoiser(component, folder / name)
        elif hasattr(component, "save_pretrained"):
            component.save_pretrained(folder / name)


def _write_denoiser(denoiser: Any, room: Path) -> None:
    room.mkdir(exist_ok=True)
    denoiser.save_config(room)
    layers = {name: module for name, module in linears(denoiser) if isinstance(module, QuantLinear)}
    tensors = {f"{prefix}.{name}".lstrip("."): t for prefix, m in denoiser.named_modules() for name, t in _own(m)}
    save_file(tensors, room / WEIGHTS, metadata={"format": "pt"})
    record = {
        "version": VERSION,
        "class": type(denoiser).__name__,
        "dtype": str(denoiser.dtype).removeprefix("torch."),
        "layers": {name: {"format": layer.format.name, "how": layer.how} for name, layer in layers.items()},
        "sha256": {name: digests(room / name) for name in (WEIGHTS, CONFIG)},
    }
    (room / RECORD).write_text(json.dumps({**record, "seal": _seal(record)}, indent=1) + "\n", encoding="utf-8")


def _own(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What a checkpoint holds of a module itself; of a quantised layer what it is packed into."""
    passing = set() if isinstance(module, QuantLinear) else module._non_persistent_buffers_set
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and name not in passing:
            yield name, tensor.detach().contiguous()


def holds(room: Path) -> bool:
    """Whether a component's folder holds a quantised denoiser, or what is left of one."""
    return any((room / name).exists() for name in (RECORD, WEIGHTS))


def read(room: Path, *, device: torch.device, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """The quantised denoiser in `room` on `device`: its weights go there packed, and nowhere else before.

    `dtype` is what its other layers are in and what it computes in; None for what was written. Raises InputError for a
    file that is missing, cut short or altered.
    """
    import diffusers

    record, path = _record(room), room / WEIGHTS
    for name in sorted({layer["format"] for layer in record["layers"].values()}):
        if reason := format_of(name).refuses(device):
            raise InputError(f"{room} is in {name}: {reason}")
    held = checkpoint.header(path)
    _check_written(path, record)
    made: Any = getattr(diffusers, record["class"], None)
    if made is None:
        raise InputError(f"{room / RECORD} names a {record['class']}, which diffusers {diffusers.__version__} lacks")
    with init_empty_weights():
        denoiser = made.from_config(made.load_config(room))
    number = dtype or getattr(torch, record["dtype"])
    with safe_open(path, framework="pt", device=str(device)) as opened:
        plain = _put_layers(denoiser, record, {key: _placed(opened.get_tensor(key)) for key in held}, dtype=number)
    plain = {key: tensor.to(_type(denoiser, key, number)) for key, tensor in plain.items()}
    missing, unexpected = denoiser.load_state_dict(plain, strict=False, assign=True)
    missing = [key for key in missing if key.removesuffix(".weight") not in record["layers"]]
    if missing or unexpected:
        raise InputError(f"{path} does not fit {room / CONFIG}: {', '.join([*missing, *unexpected][:3])}")
    # No cast of the whole: tables of positions, which no file holds, keep their type.
    return denoiser.to(device).eval()


def _type(model: Any, key: str, dtype: torch.dtype) -> torch.dtype:
    """What diffusers loads a tensor of a model of that type as: some classes keep parts of theirs in 32 bit."""
    return dtype if set(model._keep_in_fp32_modules or ()).isdisjoint(key.split(".")) else torch.float32


def _placed(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as torch places those that it makes: in a mapped file one lies at any address, kernels want some."""
    return tensor if tensor.data_ptr() % ALIGNED == 0 else tensor.clone()


def put_shapes(denoiser: torch.nn.Module, room: Path) -> None:
    """The quantised layers that `room` holds, without their values, in a `denoiser` that has shapes alone."""
    record, held = _record(room), checkpoint.header(room / WEIGHTS)
    shapes = {name: _shape(tensor) for name, tensor in held.items()}
    _put_layers(denoiser, record, shapes, dtype=getattr(torch, record["dtype"]))


def nbytes(room: Path, *, dtype: torch.dtype) -> int:
    """Bytes of the denoiser in `room`, its layers of 16 bit loaded as `dtype`."""
    layers = _record(room)["layers"]
    held = checkpoint.header(room / WEIGHTS)
    packed = {name for name in held if name.rpartition(".")[0] in layers and not name.endswith(".bias")}
    sizes = {name: STORED[tensor.dtype] if name in packed else dtype for name, tensor in held.items()}
    return sum(prod(tensor.shape) * sizes[name].itemsize for name, tensor in held.items())


def _put_layers(
    denoiser: torch.nn.Module, record: dict[str, Any], tensors: Mapping[str, torch.Tensor], *, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The quantised layers of `record`, out of `tensors`, in the places of linears; returns the tensors of the rest."""
    packed: dict[str, dict[str, torch.Tensor]] = {name: {} for name in record["layers"]}
    rest = {}
    for key, tensor in tensors.items():
        owner, _, leaf = key.rpartition(".")
        if owner in packed and leaf != "bias":
            packed[owner][leaf] = tensor
        else:
            rest[key] = tensor
    for name, layer in record["layers"].items():
        linear: Any = denoiser.get_submodule(name)
        parent, _, leaf = name.rpartition(".")
        facts = {"format": format_of(layer["format"]), "how": layer["how"], "dtype": _type(denoiser, name, dtype)}
        denoiser.get_submodule(parent)._modules[leaf] = QuantLinear(packed[name], bias=linear.bias, **facts)
    return rest


def _shape(tensor: checkpoint.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=STORED[tensor.dtype], device="meta")


def _record(room: Path) -> dict[str, Any]:
    """What was written of a quantised denoiser, itself and its configuration unchanged since."""
    path = room / RECORD
    try:
        record = json.loads(path.read_text("utf-8"))
        version, seal = record["version"], record.pop("seal", None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} cannot be read; quantise the model again") from error
    if version != VERSION:
        raise InputError(f"{path} is of another version; quantise the model again with this vivace")
    if seal != _seal(record):
        raise InputError(f"{path} was altered since it was written; copy or quantise it again")
    _check_written(room / CONFIG, record)
    return record


def _seal(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _check_written(path: Path, record: Mapping[str, Any]) -> None:
    if not path.is_file() or digests(path) != record["sha256"][path.name]:
        raise InputError(f"{path} is not the file that {RECORD} beside it was written for; copy or quantise it again")


def digests(path: Path) -> list[str]:
    """The SHA-256 of every piece of a file."""

    def digest(start: int) -> str:
        with path.open("rb") as file:
            file.seek(start)
            return hashlib.sha256(file.read(PIECE)).hexdigest()

    with ThreadPoolExecutor(max_workers=8) as pool:
        return list(pool.map(digest, range(0, path.stat().st_size, PIECE)))


def check_replaceable(folder: Path) -> None:
    """Raise InputError where `write` would remove what no earlier `write` left."""
    there = [entry for entry in folder.iterdir() if entry.name != PART] if folder.exists() else []
    if there and not any(map(holds, there)):
        raise InputError(f"{folder} is not empty and holds no quantised model; name another folder")
