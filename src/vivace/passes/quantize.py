"""Pass: linears in 8 or 4 bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch

from vivace.config import Config, Switch
from vivace.memory.leaving import Leaving
from vivace.passes.target import Pass, Target
from vivace.quant import format_of
from vivace.quant.layers import Layer, foreign, linears, matches, not_finite, survey, weight_of
from vivace.quant.linear import QuantLinear
from vivace.quant.originals import Base, file_of, files_of, never_kept
from vivace.quant.rules import best_format


def _wants(config: Config) -> Switch:
    return "auto" if config.quant in ("off", "auto") else "on"


def present(target: Target) -> str | None:
    """The format that layers are in already: loaded so, or kept from an acceleration before."""
    one_row = target.family.one_row if target.family else ()
    found = [pair for denoiser in target.denoisers.values() for pair in linears(denoiser)]
    return next((m.format.name for name, m in found if isinstance(m, QuantLinear) and not matches(name, one_row)), None)


def came_in_few_bits(target: Target) -> bool:
    """Whether layers were loaded in few bits, so that there never were originals."""
    # From an acceleration before; adapters may hide the layers themselves.
    return target.bases[0].kept == "never" if target.bases else present(target) is not None


def _format(target: Target) -> str | None:
    """The name of the format that is wanted."""
    if target.config.quant in ("off", "auto"):
        return present(target) or (best_format(target.device) if target.config.quant == "auto" else None)
    return target.config.quant


def quantises(target: Target) -> bool:
    """Whether layers will be, or are, in few bits."""
    format = _format(target)
    return format is not None and format_of(format).refuses(target.device) is None


def _survey(target: Target, format: str) -> dict[str, list[Layer]]:
    """What becomes of every linear, by denoiser."""
    family, blocks = target.family, [name for name, _ in target.repeated_blocks()]
    return {
        name: survey(
            denoiser,
            format=format_of(format),
            device=target.device,
            keep=family.keep_16bit if family else None,
            one_row=family.one_row if family else (),
            within=blocks,
            all_that_fit=target.config.quant != "auto",
            planned=target.place is not None,
        )
        for name, denoiser in target.denoisers.items()
    }


def _check(target: Target) -> str | None:
    config, format = target.config, _format(target)
    before = present(target)
    if config.quant == "off" and before is None:
        return "switched off"
    if format is None:
        return f"as loaded on {target.device.type}; quant='int8' asks for it"
    if before not in (None, format):
        return f"its layers are in {before} already; load the 16-bit model for {format}"
    if reason := next((why for denoiser in target.denoisers.values() if (why := foreign(denoiser))), None):
        return f"{reason}; load the model in 16 bit, or leave quant='off'"
    if reason := format_of(format).refuses(target.device):
        return reason
    if before is not None:
        return None
    layers = _survey(target, format)
    if not any(layer.format == format for found in layers.values() for layer in found):
        reasons = Counter(layer.why for found in layers.values() for layer in found)
        return f"no linear of it can be in {format}: {_listed(reasons)}"
    for name, denoiser in target.denoisers.items():
        chosen = [layer.name for layer in layers[name] if layer.format]
        if any(weight_of(denoiser, one).is_meta for one in chosen):
            continue  # a plan has shapes alone
        if bad := not_finite(denoiser, chosen):
            return f"{name}.{bad} holds NaN or infinity, which no scale can cover; load a sound checkpoint"
        if config.keep_base == "file" and (why := _unfiled(denoiser, chosen)):
            return why
    return None


def _unfiled(denoiser: torch.nn.Module, names: list[str]) -> str | None:
    """Why the originals of these layers cannot be left to their file; None when they can."""
    files = files_of(denoiser)
    if not files:
        return "keep_base='file' needs a model that was loaded from a folder of safetensors; use 'host'"
    for name in names:
        if file_of(name, weight_of(denoiser, name), files) is None:
            return f"keep_base='file', but {name}.weight was changed since it was loaded; use keep_base='host'"
    return None


def _apply(target: Target) -> None:
    format = _format(target)
    assert format is not None
    layers = _survey(target, format)
    loaded = came_in_few_bits(target)
    if loaded and not target.bases:
        target.bases += [never_kept(d, places=_places(d)) for d in target.denoisers.values()]
    elif present(target) is None:
        for name, found in layers.items():
            _quantise(target, name, found)
    for lane in target.lanes.values():
        if lane.adapters is not None:
            lane.adapters.lift()  # what it held out stood in front of the originals
    target.layers = {name: tuple(found) for name, found in layers.items()}
    kept = "as loaded" if loaded else f"originals: {_where(target.bases)}"
    target.done("quant", f"{_counted(format, layers)}, {kept}")


def _counted(format: str, layers: Mapping[str, list[Layer]]) -> str:
    every = [layer for found in layers.values() for layer in found]
    hows = Counter(layer.how for layer in every if layer.format == format)
    stored = Counter(layer.format for layer in every if layer.format not in (format, None))
    others = [f"{count} that read one row a sample in {name}" for name, count in stored.items()]
    plain = sum(layer.format is None for layer in every)
    return ", ".join((f"{format}: {sum(hows.values())} linears ({_listed(hows)})", *others, f"{plain} in 16 bit"))


def _forecast(target: Target) -> str:
    format = _format(target)
    assert format is not None
    return _counted(format, _survey(target, format))


def savings(target: Target) -> dict[int, int]:
    """The bytes that every linear gives up which will be in few bits, by the id of its module; from shapes alone."""
    if _check(target) is not None or present(target) is not None:
        return {}
    format, found = _format(target), dict[int, int]()
    assert format is not None
    for name, layers in _survey(target, format).items():
        for layer in layers:
            if layer.format and layer.how:
                weight = torch.empty_like(weight_of(target.denoisers[name], layer.name), device="meta")
                packed = format_of(layer.format).pack(weight, layer.how)
                linear = target.denoisers[name].get_submodule(layer.name)
                found[id(linear)] = weight.nbytes - sum(part.nbytes for part in packed.values())
    return found


def _quantise(target: Target, name: str, layers: list[Layer]) -> None:
    denoiser, chosen = target.denoisers[name], {layer.name: layer for layer in layers if layer.format}
    files = _files(target, denoiser, list(chosen))
    keep = target.config.keep_base
    base = Base(kept="file" if files else "host" if keep == "auto" else keep)  # pyright: ignore[reportArgumentType]
    target.bases.append(base)  # before the first swap: what fails halfway is put back
    places, leave = _places(denoiser), Leaving()
    for layer_name, layer in chosen.items():
        linear = denoiser.get_submodule(layer_name)
        assert isinstance(linear, torch.nn.Linear)
        assert layer.format
        assert layer.how
        stand_in = QuantLinear.of(linear, format=format_of(layer.format), how=layer.how, on=target.place)
        base.swap(layer_name, linear, stand_in, leave=leave, places=places[linear], file=files.get(layer_name))


def _files(target: Target, denoiser: torch.nn.Module, names: list[str]) -> Mapping[str, Path]:
    """Layer -> the file that holds its weight, when all of them have one and that is wanted; else nothing."""
    if target.config.keep_base not in ("auto", "file"):
        return {}
    files = files_of(denoiser)
    found = {}
    for name in names if files else ():
        path = file_of(name, weight_of(denoiser, name), files)
        if path is None:
            return {}
        found[name] = path
    return found


def _places(denoiser: torch.nn.Module) -> dict[torch.nn.Module, list[tuple[torch.nn.Module, str]]]:
    """Module -> its parents and names in them; a shared module has several."""
    places: dict[torch.nn.Module, list[tuple[torch.nn.Module, str]]] = {}
    for parent in denoiser.modules():
        for leaf, child in parent._modules.items():
            if child is not None:
                places.setdefault(child, []).append((parent, leaf))
    return places


def _where(bases: list[Base]) -> str:
    words = {"file": "in the model's file", "host": "on the host", "no": "not kept"}
    held = sum(base.nbytes for base in bases)
    return ", ".join(words[kept] for kept in {base.kept: None for base in bases}) + (
        f", {held / 2**30:.2f} GiB" if held else ""
    )


def _listed(counts: Counter) -> str:
    return ", ".join(f"{count} {what}" for what, count in counts.most_common())


QUANTIZE = Pass(
    name="quant",
    why_here="before fuse: the fused blocks stack the layers they find, and hand them rows that are quantised already",
    wants=_wants,
    check=_check,
    apply=_apply,
    forecast=_forecast,
    adds_bytes=lambda target: -sum(savings(target).values()),
)
