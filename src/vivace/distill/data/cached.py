"""Batches whose latents and prompt embeddings were computed beforehand: one safetensors file a batch."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vivace.distill.call import Call
from vivace.distill.objective import Item
from vivace.errors import InputError

if TYPE_CHECKING:
    from vivace.distill.config import DistillConfig

FIELDS = ("sample", "halves", "time_scale", "packed")
MADE_OF = ("teacher", "pipeline", "control", "conditioners", "size", "negative")


def made_of(config: DistillConfig, *, device: str = "cpu") -> dict[str, Any]:
    """What of a config, on a kind of device, an item depends on, beside the pictures themselves.

    Of folders their names, which may lie elsewhere later.
    """
    values = config.to_dict()
    found = {name: values[name] for name in MADE_OF}
    found |= {name: Path(found[name]).name for name in ("teacher", "control") if found[name]}
    return {**found, "data.ratios": values["data"]["ratios"], "precision": config.computes_in(device)}


def write_item(item: Item, path: Path, *, made: Mapping[str, Any] | None = None) -> None:
    """Write an item: its tensors, and how they hang together and what it was made of as JSON in the file's header."""
    tensors: dict[str, torch.Tensor] = {"z": item.z.cpu().contiguous()}
    call = item.call
    tree = {name: _strip(getattr(call, name), f"call.{name}", tensors) for name in ("kwargs", "beside", "control")}
    about = {**{name: getattr(call, name) for name in FIELDS}, **tree}
    save_file(tensors, path, metadata={"call": json.dumps(about), "made": json.dumps(made or {})})


def read_item(path: Path, *, device: str | torch.device = "cpu") -> Item:
    """The item in a file that `write_item` wrote. Raises InputError for any other."""
    # Of several processes each one's CPU has a number, by which safetensors does not know it.
    place = "cpu" if torch.device(device).type == "cpu" else str(device)
    try:
        with safe_open(path, framework="pt", device=place) as file:
            about = json.loads((file.metadata() or {})["call"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        tree = {name: _hang(about[name], tensors) for name in ("kwargs", "beside", "control")}
        return Item(tensors["z"], Call(**{name: about[name] for name in FIELDS}, **tree))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(f"{path} is not a batch that `vivace distill --precache` wrote; write it again") from error


def check_made(path: Path, made: Mapping[str, Any]) -> None:
    """Raise InputError, naming what differs, for an item that was made of something else."""
    with safe_open(path, framework="pt") as file:
        before = json.loads((file.metadata() or {}).get("made", "{}"))
    changed = [f"{name}: {before.get(name)} -> {value}" for name, value in made.items() if before.get(name) != value]
    if changed:
        raise InputError(
            f"{path} was written with another config: {'; '.join(changed)}; put it back, or write it again elsewhere"
        )


def _strip(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """`value` with every tensor moved to `tensors` and its name in its place."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"map": {key: _strip(one, f"{name}.{key}", tensors) for key, one in value.items()}}
    if isinstance(value, list | tuple):
        return {"list": [_strip(one, f"{name}.{index}", tensors) for index, one in enumerate(value)]}
    return value


def _hang(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The inverse of `_strip`."""
    if not isinstance(value, Mapping):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "list" in value:
        return [_hang(one, tensors) for one in value["list"]]
    return {key: _hang(one, tensors) for key, one in value["map"].items()}


class Cached:
    """Endless items out of a folder of such files, in an order of each epoch's own; the next one is read ahead."""

    def __init__(
        self,
        folder: str,
        *,
        batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        device: str = "cpu",
        made: Mapping[str, Any] | None = None,
    ) -> None:
        self.files = sorted(Path(folder).expanduser().glob("*.safetensors"))[rank::world]
        if not self.files:
            raise InputError(f"{folder} holds no batch for process {rank}; write some with vivace distill --precache")
        held = len(read_item(self.files[0]).z)
        if held != batch:
            raise InputError(f"{folder} holds batches of {held}, and batch is {batch}; set batch: {held}")
        if made is not None:
            check_made(self.files[0], made)
        self.seed, self.device = seed, device
        self.epoch, self.position = 0, 0
        self._order: tuple[int, list[int]] = (-1, [])  # an epoch, and the files' order in it
        self._reader = ThreadPoolExecutor(1)
        self._ahead: tuple[Path, Future[Item]] | None = None

    def __next__(self) -> Item:
        path = self._step()
        item = self._ahead[1] if self._ahead and self._ahead[0] == path else self._read(path)
        # One further, and back: the state is of what was handed out.
        before = self.state()
        following = self._step()
        self.load(before)
        found = item.result()
        self._ahead = following, self._read(following)
        return found

    def state(self) -> dict[str, Any]:
        """Where the stream stands."""
        return {"epoch": self.epoch, "position": self.position}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go to where `state` was taken."""
        self.epoch, self.position = state["epoch"], state["position"]

    def _step(self) -> Path:
        """Go one file on; which one that is."""
        if self.position == len(self.files):
            self.epoch, self.position = self.epoch + 1, 0
        if self._order[0] != self.epoch:
            self._order = self.epoch, list(range(len(self.files)))
            random.Random(f"{self.seed}/{self.epoch}").shuffle(self._order[1])
        self.position += 1
        return self.files[self._order[1][self.position - 1]]

    def _read(self, path: Path) -> Future[Item]:
        return self._reader.submit(read_item, path, device=self.device)
