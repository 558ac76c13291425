"""Every linear of a denoiser, and what is to become of it: in few bits, or left in 16 and why."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

import torch

from vivace.quant import format_of
from vivace.quant.format import Format, How
from vivace.quant.linear import QuantLinear
from vivace.quant.rules import rule_for
from vivace.watch import hooked

DEFAULT_KEEP = ("*norm*", "*mod*", "*emb*", "*ada*", "*time*", "*proj_out*")
"""Names that stay in 16 bit in a model of no known family: what steers a block must not lose digits."""

ONE_ROW = "int8_weights"
"""What linears take that read one row a sample: memory bound, so that 8 bits to read are worth more than 8 bits to
multiply; and they steer all of a block, so their input keeps its digits."""

FOREIGN = {"torchao": "torchao", "bitsandbytes": "bitsandbytes", "gguf": "GGUF", "quanto": "quanto"}
"""A package in the name of a layer's or weight's class -> who quantised it."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One linear, for the report."""

    name: str  # within the denoiser
    outputs: int
    inputs: int
    format: str | None  # None: as it was
    how: How | None = None
    why: str = ""  # it stays as it is


def linears(denoiser: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Every linear, quantised ones included, once; an adapter's own low-rank linears are not among them."""
    for name, module in denoiser.named_modules():
        if isinstance(module, torch.nn.Linear | QuantLinear) and not any(
            p.startswith("lora_") for p in name.split(".")
        ):
            yield name, module


def weight_of(denoiser: torch.nn.Module, name: str) -> torch.Tensor:
    """The weight of the linear of that name, without its gradient."""
    return denoiser.get_parameter(f"{name}.weight").detach()


def survey(
    denoiser: torch.nn.Module,
    *,
    format: Format,
    device: torch.device,
    keep: Sequence[str] | None,
    one_row: Sequence[str] = (),
    within: Sequence[str] = (),
    all_that_fit: bool,
    planned: bool = False,
) -> list[Layer]:
    """What becomes of every linear of `denoiser` in `format` on `device`.

    `keep` are the family's patterns, None where there is no family: then only linears inside the modules `within` come
    into question. Linears of the patterns `one_row` take the format `ONE_ROW`. With `all_that_fit` a layer stays in 16
    bit only where its shape or the family says so, else also where it is not measured to pay. A `planned` denoiser has
    shapes and no weights yet.
    """
    found = []
    shares = Counter(id(m.weight) for _, m in linears(denoiser) if isinstance(m, torch.nn.Linear))
    for name, module in linears(denoiser):
        outputs, inputs = int(module.out_features), int(module.in_features)  # pyright: ignore[reportArgumentType]
        facts = {"name": name, "outputs": outputs, "inputs": inputs}
        if isinstance(module, QuantLinear):
            found.append(Layer(**facts, format=module.format.name, how=module.how))
            continue
        alone = matches(name, one_row)
        wanted, kept = (format_of(ONE_ROW), None) if alone else (format, _kept(name, keep, within))
        rule = rule_for(outputs=outputs, inputs=inputs, format=wanted, device=device)
        untouchable = _untouchable(module, planned=planned, shared=shares[id(module.weight)] > 1)
        why = untouchable or kept or _misfit(outputs, inputs, wanted)
        if not why and not all_that_fit and (rule is None or rule.how is None):
            why = rule.why if rule else f"{outputs} x {inputs} is not measured to pay"
        how = (rule and rule.how) or "rowwise"
        found.append(Layer(**facts, format=None if why else wanted.name, how=None if why else how, why=why or ""))
    return found


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a linear's name is one of `patterns`, under an adapter too."""
    return any(fnmatch(name.removesuffix(".base_layer"), pattern) for pattern in patterns)


def foreign(denoiser: torch.nn.Module) -> str | None:
    """Who quantised `denoiser` already, if it was not us."""
    for name, module in denoiser.named_modules():
        origins = [type(module), *(type(p) for p in module._parameters.values() if p is not None)]
        rooms = {room for origin in origins for room in origin.__module__.split(".")}
        if titles := [title for room, title in FOREIGN.items() if room in rooms]:
            at = name or "the denoiser"
            return f"{at} is quantised by {titles[0]} already"
    return None


def not_finite(denoiser: torch.nn.Module, names: Sequence[str]) -> str | None:
    """The first of these linears whose weight holds a NaN or an infinity. Waits for the device once."""
    if not names:
        return None
    ends = [torch.stack(weight_of(denoiser, name).aminmax()).float() for name in names]
    bad = (~torch.stack(ends).isfinite().all(1)).nonzero().flatten().tolist()
    return f"{names[bad[0]]}.weight" if bad else None


def condensed(layers: Sequence[Layer]) -> list[str]:
    """One line for all layers that differ only in the numbers of their blocks and share a fate."""
    fates = (f"{layer.format} {layer.how}" if layer.format else layer.why for layer in layers)
    counts = Counter(zip((condensed_name(layer.name) for layer in layers), fates, strict=True))
    return [f"{name}  {count} x {fate}" for (name, fate), count in counts.items()]


def condensed_name(name: str) -> str:
    """`blocks.3.attn.to_q` as `blocks.*.attn.to_q`."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _untouchable(module: torch.nn.Module, *, planned: bool, shared: bool) -> str | None:
    if type(module).forward is not torch.nn.Linear.forward or "NonDynamically" in type(module).__name__:
        return f"a {type(module).__name__} computes more than a linear"
    if type(module.weight) is not torch.nn.Parameter or not module.weight.dtype.is_floating_point:
        return f"its weight is a {type(module.weight).__name__} of {str(module.weight.dtype).removeprefix('torch.')}"
    if shared:
        return "its weight is another layer's too"
    if module.weight.is_meta and not planned:
        return "its weight is offloaded"
    if hooked(module) or hasattr(module, "_hf_hook"):
        return "it carries a hook"
    return None


def _kept(name: str, keep: Sequence[str] | None, within: Sequence[str]) -> str | None:
    name = name.removesuffix(".base_layer")
    if keep is not None:
        return next((f"the family keeps {pattern}" for pattern in keep if fnmatch(name, pattern)), None)
    if not any(name.startswith(f"{block}.") for block in within):
        return "outside the repeated blocks"
    pattern = next((pattern for pattern in DEFAULT_KEEP if fnmatch(name, pattern)), None)
    return f"{pattern} is kept in models of no known family" if pattern else None


def _misfit(outputs: int, inputs: int, format: Format) -> str | None:
    of_outputs, of_inputs = format.multiples
    if outputs % of_outputs or inputs % of_inputs:
        return f"{format.name} takes multiples of {of_outputs} x {of_inputs}, this is {outputs} x {inputs}"
    return None
