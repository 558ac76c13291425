"""What contestants made of the prompts, on disk: a run that is stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from vivace.errors import InputError

LONGEST = 100
"""Letters of a folder's name; file systems take 255."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One prompt drawn by one contestant."""

    contestant: str
    index: int  # of the prompt
    prompt: str
    seed: int
    key: str  # digest of everything that decides the picture and its time: these settings and the prompt
    seconds: float | None  # None: drawn together with others, so that its time is not its own
    computed: float | None  # share of denoiser calls computed; None without a cache
    peak_bytes: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    written: float = 0.0  # seconds since 1970: of two processes' drawings the newer one is there


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What was drawn, as it is read back."""

    latents: torch.Tensor
    frames: torch.Tensor  # [F, 3, H, W] float in [0, 1]; a picture is one frame


class Store:
    """A folder with one sub-folder a contestant, and the records of what is in them."""

    def __init__(self, folder: Path, *, rank: int = 0) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write to {folder}: {error.strerror}; choose another folder with -o") from error
        self._own = folder / f"records-{rank}.jsonl"

    def records(self) -> dict[tuple[str, int], Record]:
        """All that was drawn, by whichever process, the newest of each (contestant, prompt)."""
        found: dict[tuple[str, int], Record] = {}
        for path in sorted(self.folder.glob("records-*.jsonl")):
            for line in path.read_text("utf-8").splitlines():
                try:
                    record = Record(**json.loads(line))
                except (ValueError, TypeError):
                    # The last line of a run that was killed while it wrote.
                    continue
                place = record.contestant, record.index
                found[place] = max(record, found.get(place, record), key=lambda one: one.written)
        return found

    def holds(self, record: Record | None, *, key: str) -> bool:
        """Whether there is such a drawing, made by the very same settings, and its files are still there."""
        if record is None or record.key != key:
            return False
        place = record.contestant, record.index
        return self._path(*place).is_file() and self.picture(*place).is_file()

    def keep(self, record: Record, *, latents: torch.Tensor, frames: torch.Tensor) -> None:
        """Write a drawing: its tensors, its picture (the middle frame), and last the record that makes it count."""
        path = self._path(record.contestant, record.index)
        path.parent.mkdir(exist_ok=True)
        pixels = (frames.clamp(0, 1) * 255).round().to(torch.uint8).cpu()
        part = path.with_suffix(f".{os.getpid()}")
        save_file({"latents": latents.contiguous().cpu(), "frames": pixels.contiguous()}, part)
        os.replace(part, path)
        middle = pixels[len(pixels) // 2].permute(1, 2, 0)
        Image.fromarray(middle.numpy()).save(path.with_suffix(".png"))
        with self._own.open("a", encoding="utf-8") as file:
            # The newline comes first: a run that was killed may have left half a line.
            file.write("\n" + json.dumps({**asdict(record), "written": time.time()}, default=str))

    def drawn(self, contestant: str, index: int) -> Drawn:
        """A drawing, with its pixels as they were rounded to 8 bits."""
        tensors = load_file(self._path(contestant, index))
        return Drawn(latents=tensors["latents"], frames=tensors["frames"].float() / 255)

    def picture(self, contestant: str, index: int) -> Path:
        """The PNG of a drawing."""
        return self._path(contestant, index).with_suffix(".png")

    def _path(self, contestant: str, index: int) -> Path:
        return self.folder / slug(contestant) / f"{index:04d}.safetensors"


def slug(name: str) -> str:
    """A contestant's name as a folder's; of one that a folder cannot have, what it can, and a digest."""
    safe = "".join(letter if letter.isalnum() or letter in "-_=." else "_" for letter in name)[:LONGEST]
    return safe if safe == name else f"{safe}-{key_of({'name': name})}"


def key_of(settings: Mapping[str, Any]) -> str:
    """A digest of plain settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]
