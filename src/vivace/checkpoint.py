"""What a weight file holds, read from its header alone: no tensor is loaded and nothing is ever unpickled."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from vivace.errors import InputError

PICKLES = frozenset({".bin", ".ckpt", ".pkl", ".pickle", ".pt", ".pth"})
# A zip archive (torch.save since 1.6) or a bare pickle stream, whatever the file is called.
PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
# What a tokenizer is made of: one file of each.
SETTINGS = ("tokenizer_config.json",)
WORDS = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model")
# The format's own limit on the length of a header.
HEADER_LIMIT = 100_000_000


class Tensor(NamedTuple):
    """One tensor's entry in a header."""

    dtype: str
    shape: tuple[int, ...]


def header(path: Path) -> dict[str, Tensor]:
    """The names, dtypes and shapes in a safetensors file, checked against the file's true length.

    Raises InputError for a missing file, a pickle under any name, another format, and a file that was cut short.
    """
    if not os.path.isfile(path):
        raise InputError(f"no weight file {path}; check the path")
    with path.open("rb") as file:
        start = file.read(8)
        if path.suffix.lower() in PICKLES or start.startswith(PICKLE_STARTS):
            raise InputError(
                f"{path} is a pickle checkpoint, refused because loading one can run any code; give a .safetensors file"
            )
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= length <= HEADER_LIMIT:
            raise InputError(f"{path} is not a safetensors file, or is cut short; fetch or export it again")
        text = file.read(length)
    size = path.stat().st_size
    if len(text) < length:
        raise InputError(f"{path} is truncated: {size} bytes, and its header alone needs {8 + length}; fetch it again")
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        tensors = {name: Tensor(entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{path} is not a safetensors file: its header cannot be read; give a .safetensors file"
        ) from error
    if size < 8 + length + end:
        raise InputError(
            f"{path} is truncated: {size} bytes, where its header promises {8 + length + end}; fetch it again"
        )
    return tensors


def check_folder(folder: Path, *, components: Iterable[str]) -> None:
    """Check every safetensors file of a pipeline folder's components, and that they and the tokenizers are described.

    Raises InputError for a component that is missing, that comes only as a pickle, or whose file is truncated; and for
    one without its configuration or its words, in place of which transformers takes others, and says nothing.
    """
    for component in components:
        room = folder / component
        if not room.is_dir():
            raise InputError(f"{folder} is not complete: model_index.json lists {component!r}, which is missing")
        weights = sorted(room.glob("*.safetensors"))
        if component.startswith("tokenizer"):
            _check_files(room, SETTINGS, WORDS)
        elif weights:
            _check_files(room, ("config.json",))
        pickles = [file for file in sorted(room.iterdir()) if file.suffix.lower() in PICKLES]
        for file in weights or pickles:
            header(file)


def _check_files(room: Path, *kinds: tuple[str, ...]) -> None:
    for names in kinds:
        if not any(file for name in names for file in room.glob(name)):
            raise InputError(f"{room} is not complete: it has no {' or '.join(names)}; fetch or export it again")
