"""Where the original weights of quantised layers are kept: in the model's file, on the host, or nowhere."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open

from vivace import checkpoint
from vivace.errors import InputError
from vivace.memory.leaving import Leaving
from vivace.quant.linear import QuantLinear

Keep = Literal["auto", "file", "host", "no"]

SAME = 0.999
"""Share of packed values that must come out again from a file's weight; devices may round the odd one differently."""


@dataclass(kw_only=True)
class Swap:
    """One linear and what stands in its place."""

    name: str
    original: torch.nn.Linear  # with the bytes of its weight, or without
    stand_in: QuantLinear
    places: list[tuple[torch.nn.Module, str]]  # parents, and its name in each
    file: Path | None = None  # holds the weight

    def bare(self) -> Callable[[], None]:
        """Give the original a weight of its shape that takes no bytes: what PEFT can adapt. Returns the undo."""
        weight, stand_in = self.original.weight, self.stand_in
        data, nothing = weight.data, torch.zeros(1, 1, dtype=stand_in.dtype, device=stand_in.device)
        weight.data = nothing.expand(stand_in.out_features, stand_in.in_features)

        def undo() -> None:
            weight.data = data

        return undo


@dataclass(kw_only=True)
class Base:
    """The originals of one denoiser's quantised layers."""

    kept: Literal["file", "host", "no", "never"]  # never: the model came in few bits
    swaps: list[Swap] = field(default_factory=list)
    nbytes: int = 0  # on the host

    def swap(
        self, name: str, original: torch.nn.Linear, stand_in: QuantLinear, *, leave: Leaving, **where: Any
    ) -> None:
        """Put `stand_in` in the original's places and let go of the original's bytes as far as is agreed."""
        for parent, leaf in where["places"]:
            parent._modules[leaf] = stand_in
        self.swaps.append(Swap(name=name, original=original, stand_in=stand_in, **where))
        weight = original.weight
        if self.kept == "host":
            stand_in.keep = functools.partial(_keep, weight)
        if self.kept != "host":
            weight.data = torch.empty(0, dtype=weight.dtype, device=weight.device)
        elif weight.device.type != "cpu":
            weight.data = leave(weight.data)
            self.nbytes += weight.nbytes

    def original(self, swap: Swap) -> torch.Tensor:
        """The 16-bit weight of a swapped linear, from where it is kept. Raises InputError where it is not."""
        if self.kept == "never":
            raise InputError(f"{swap.name} came in few bits, so adapters cannot be merged into it; use lora='side'")
        if self.kept == "no":
            raise InputError(
                f"the 16-bit weight of {swap.name} was not kept (keep_base='no'), so adapters cannot be merged into "
                "it; use lora='side', or keep_base='host'"
            )
        return stored_weight(swap, dtype=swap.stand_in.dtype) if self.kept == "file" else swap.original.weight.data

    def check(self) -> None:
        """Raise InputError where the originals cannot be had again, before anything is put back."""
        if self.kept == "no" and self.swaps:
            raise InputError(
                "the 16-bit weights were not kept (keep_base='no'), so this pipeline cannot go back to them; load it "
                "again, or accelerate it with keep_base='file' or 'host' next time"
            )
        for swap in self.swaps if self.kept == "file" else ():
            mine = swap.stand_in.packed["values"]
            stored = stored_weight(swap, dtype=swap.stand_in.dtype).to(mine.device)
            packed = swap.stand_in.format.pack(stored, swap.stand_in.how)["values"]
            same = packed.shape == mine.shape and (packed.view(torch.uint8) == mine.view(torch.uint8)).float().mean()
            if same < SAME:
                raise InputError(
                    f"{swap.file} no longer holds the weight that {swap.name} was quantised from, so it cannot be "
                    "restored from there; put the file back, or load the pipeline again"
                )

    def put_back(self) -> None:
        """The original linears again, on the device and in the type of what stood in for them, where they are kept."""
        for swap in self.swaps if self.kept == "never" else ():
            for parent, leaf in swap.places:
                # PEFT's layer, where adapters are loaded.
                if getattr(layer := parent._modules.get(leaf), "base_layer", None) is swap.original:
                    layer.base_layer = swap.stand_in  # pyright: ignore[reportOptionalMemberAccess]
        for swap in self.swaps if self.kept not in ("no", "never") else ():
            weight, stand_in = swap.original.weight, swap.stand_in
            data = stored_weight(swap, dtype=stand_in.dtype) if self.kept == "file" else weight.data
            weight.data = data.to(stand_in.device, stand_in.dtype)
            swap.original.register_parameter("bias", stand_in.bias)
            for parent, leaf in swap.places:
                # A layer that was replaced since is no longer ours to put back.
                if parent._modules.get(leaf) is stand_in:
                    parent._modules[leaf] = swap.original
        self.swaps.clear()


def _keep(weight: torch.Tensor, loaded: torch.Tensor) -> None:
    """Another original in the place of the one on the host: a checkpoint was loaded into the quantised layer."""
    weight.data = loaded.to(weight.device, weight.dtype, copy=True)


def never_kept(denoiser: torch.nn.Module, *, places: Mapping[torch.nn.Module, list[tuple[Any, str]]]) -> Base:
    """Plain linears without a weight for the layers of a model that came in few bits: what PEFT can adapt."""
    base = Base(kept="never")
    for name, layer in denoiser.named_modules():
        if isinstance(layer, QuantLinear):
            linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            nothing = torch.empty(0, dtype=layer.dtype, device=layer.device)
            linear.weight = torch.nn.Parameter(nothing, requires_grad=False)
            linear.register_parameter("bias", layer.bias)
            base.swaps.append(Swap(name=name, original=linear, stand_in=layer, places=places[layer]))
    return base


def files_of(denoiser: torch.nn.Module) -> dict[str, list[Path]]:
    """The safetensors files that hold each of the denoiser's tensors, where it was loaded from a folder."""
    folder = Path(str(getattr(denoiser, "config", {}).get("_name_or_path") or "/nowhere"))
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        for name in checkpoint.header(path):
            found.setdefault(name, []).append(path)
    return found


def file_of(name: str, weight: torch.Tensor, files: Mapping[str, list[Path]]) -> Path | None:
    """The file that holds exactly this weight under `name`, in its own or a wider type; None where none does."""
    for path in files.get(f"{name}.weight", ()):
        with safe_open(path, framework="pt") as opened:
            stored = opened.get_tensor(f"{name}.weight")
        if stored.shape == weight.shape and torch.equal(stored.to(weight.device, weight.dtype), weight):
            return path
    return None


def stored_weight(swap: Swap, *, dtype: torch.dtype) -> torch.Tensor:
    """The weight as its file holds it now. Raises InputError where the file is gone or cannot be read."""
    assert swap.file is not None
    held = checkpoint.header(swap.file)
    if f"{swap.name}.weight" not in held:
        raise InputError(f"{swap.file} no longer holds {swap.name}.weight; put the file back")
    with safe_open(swap.file, framework="pt") as opened:
        return opened.get_tensor(f"{swap.name}.weight").to(dtype)
