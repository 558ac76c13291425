"""Pass: LoRA layers held out of the tree, their effect merged into the weights or computed beside them."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from vivace.config import Config, Switch
from vivace.lora import files
from vivace.lora.adapters import PIPELINE_METHODS, Adapters, Holder, lowering, refuses
from vivace.lora.merged import Merged
from vivace.lora.side import Sides, hidden
from vivace.passes.quantize import came_in_few_bits, quantises
from vivace.passes.target import Pass, Target, device_of

if TYPE_CHECKING:
    from vivace.lane import Lane


def _wants(config: Config) -> Switch:
    return config.lora if config.lora in ("auto", "off") else "on"


def _check(target: Target) -> str | None:
    for name, denoiser in target.denoisers.items():
        if not hasattr(denoiser, "load_lora_adapter"):
            return f"a {type(denoiser).__name__} takes no LoRA"
        if why := refuses(denoiser):
            return f"{name}.{why}; PEFT computes it"
        linears = ((at, m) for at, m in denoiser.named_modules() if target.config.lora == "side" and m._parameters)
        if why := next((why for at, m in linears if (why := hidden(at, m))), None):
            return f"{name}.{why}; lora='off' leaves adapters to PEFT"
    why = _only_beside(target) if target.config.lora == "merged" else None
    return f"{why}; lora='side' puts adapters beside them" if why else None


def _only_beside(target: Target) -> str | None:
    """Why nothing can be merged into the weights, or None."""
    if came_in_few_bits(target):
        return "its layers came in few bits"
    if quantises(target) and target.config.keep_base == "no":
        return "the 16-bit weights are not kept (keep_base='no')"
    return None


def _beside(target: Target) -> bool:
    return target.config.lora == "side" or _only_beside(target) is not None


def _apply(target: Target) -> None:
    beside = _beside(target)
    for lane in target.lanes.values():
        effect = _sides(lane) if beside else _merged(lane, target)
        # The list, which the pass that quantises fills.
        lane.adapters = Adapters(lane.denoiser, effect=effect, bases=target.bases)
        lane.adapters.lift()
        target.undo.callback(lane.adapters.close)
    target.done("lora", _forecast(target))


def _forecast(target: Target) -> str:
    if not _beside(target):
        return "merged into the weights in place"
    why = _only_beside(target) if target.config.lora == "auto" else None
    return "low-rank products beside the linears" + (f": {why}" if why else "")


def _merged(lane: Lane, target: Target) -> Merged:
    # On the CPU products keep a form of their own of a quantised weight; elsewhere they read what is written in place.
    rebuilt = lane.release if target.device.type == "cpu" else lambda: None
    return Merged(on_device=target.config.vram is None, rebuilt=rebuilt)


def _holders(target: Target) -> list[Holder | None]:
    return [*(lane.adapters for lane in target.lanes.values()), *target.encoders]


def _sides(lane: Lane) -> Sides:
    # Looked up when it is called: a later pass sets the lane's runner.
    return Sides(changed=lambda: lane.run.clear(), device=lambda: device_of(lane.denoiser), outdated=lane.outdate)


def lora_methods(target: Target) -> dict[str, Any]:
    """The pipeline's own LoRA methods, as members of its class: they find the layers in the tree, and files checked."""
    stock = type(target.subject)
    members = lowering(stock, PIPELINE_METHODS, adapters=lambda: _holders(target))
    if "load_lora_weights" in members:
        load = members["load_lora_weights"]

        @functools.wraps(stock.load_lora_weights)
        def load_lora_weights(self: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
            return files.load(self, source, *args, stock=functools.partial(load, self), **kwargs)

        members["load_lora_weights"] = load_lora_weights
    return members


LORA = Pass(
    name="lora",
    why_here="before everything that rearranges or records weights: it takes PEFT's layers out of its way",
    wants=_wants,
    check=_check,
    apply=_apply,
    forecast=_forecast,
)
