"""Pass: the text encoders' linears in 8 or 4 bits, where that is asked for; which attention they use, in any case."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from vivace.lora.encoder import Quantised
from vivace.memory.leaving import Leaving
from vivace.passes.target import Pass, Target, repeating_lists
from vivace.quant import format_of
from vivace.quant.layers import Layer, foreign, not_finite, survey, weight_of
from vivace.quant.linear import QuantLinear
from vivace.quant.originals import Base

KEEP = ("*lm_head", "*projection", "*visual.*")
"""What stays in 16 bit: heads of training, the last product of an embedding, the eyes of a language model."""


class EncoderLinear(QuantLinear):
    """A quantised linear whose owner may first ask for the type of its weight, as T5 does: it has none."""

    weight = None


def encoders_of(target: Target) -> dict[str, Any]:
    """The pipeline's text encoders, by name."""
    if target.subject in target.denoisers.values():
        return {}
    parts = getattr(target.subject, "components", None) or vars(target.subject)
    return {n: m for n, m in parts.items() if n.startswith("text_encoder") and isinstance(m, torch.nn.Module)}


def _check(target: Target) -> str | None:
    encoders, format = encoders_of(target), target.config.encoders
    if not encoders:
        return "there is no text encoder"
    if format == "off":
        return f"as loaded; {_attention(target)}"
    if reason := format_of(format).refuses(target.device):
        return reason
    for name, encoder in encoders.items():
        if any(isinstance(module, EncoderLinear) for module in encoder.modules()):
            return f"{name} is in few bits already, through another pipeline; call vivace.restore on that one first"
        if reason := foreign(encoder):
            return f"{name}: {reason}; load it in 16 bit, or leave encoders='off'"
        chosen = [layer.name for layer in _layers(target, encoder) if layer.format]
        if encoder.device.type != "meta" and (bad := not_finite(encoder, chosen)):
            return f"{name}.{bad} holds NaN or infinity, which no scale can cover; load a sound checkpoint"
    if not any(layer.format for _, layer in _all_layers(target)):
        return f"no linear of {', '.join(encoders)} can be in {format}"
    return None


def _layers(target: Target, encoder: Any) -> list[Layer]:
    found = survey(
        encoder,
        format=format_of(target.config.encoders),
        device=target.device,
        keep=KEEP,
        all_that_fit=True,
        planned=target.place is not None or encoder.device.type == "meta",
    )
    # What a model holds in another type than its own (T5 its last products, in float32) it has a reason for.
    inside = tuple(f"{name}." for name in repeating_lists(encoder))
    return [one for one in found if one.name.startswith(inside) and weight_of(encoder, one.name).dtype == encoder.dtype]


def _all_layers(target: Target) -> Iterator[tuple[str, Layer]]:
    for name, encoder in encoders_of(target).items():
        yield from ((name, layer) for layer in _layers(target, encoder))


def _apply(target: Target) -> None:
    said, held = _forecast(target), 0
    for encoder in encoders_of(target).values():
        base, leave = Base(kept="host"), Leaving()
        target.encoders.append(quantised := Quantised(encoder, base))
        target.undo.callback(quantised.close)
        for layer in _layers(target, encoder):
            if layer.format and layer.how:
                parent, _, leaf = layer.name.rpartition(".")
                place, linear = encoder.get_submodule(parent), encoder.get_submodule(layer.name)
                stand_in = EncoderLinear.of(linear, format=format_of(layer.format), how=layer.how)
                base.swap(layer.name, linear, stand_in, leave=leave, places=[(place, leaf)])
        held += base.nbytes
    target.done("encoders", f"{said}; originals: on the host, {held / 2**30:.2f} GiB")


def _forecast(target: Target) -> str:
    layers = [layer for _, layer in _all_layers(target)]
    chosen = sum(layer.format is not None for layer in layers)
    return f"{target.config.encoders}: {chosen} linears of {', '.join(encoders_of(target))}; {_attention(target)}"


def _adds_bytes(target: Target) -> int:
    added = 0
    for name, layer in _all_layers(target):
        if layer.format and layer.how:
            weight = weight_of(encoders_of(target)[name], layer.name)
            packed = format_of(layer.format).pack(weight, layer.how)
            added += sum(part.nbytes for part in packed.values()) - weight.nbytes
    return added


def _attention(target: Target) -> str:
    """What computes attention in each encoder: transformers' own choice, as it says it."""
    used = ((name, getattr(e.config, "_attn_implementation", None)) for name, e in encoders_of(target).items())
    return "attention " + ", ".join(f"{name} {how or 'its own'}" for name, how in used)


ENCODERS = Pass(
    name="encoders",
    why_here="before vram, which places their bytes",
    wants=lambda config: "auto" if config.encoders == "off" else "on",
    check=_check,
    apply=_apply,
    forecast=_forecast,
    adds_bytes=_adds_bytes,
)
