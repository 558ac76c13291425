"""LoRA files: checked against the pipeline before anything is changed, and what matches nothing is named."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from safetensors.torch import load_file

from vivace import checkpoint
from vivace.errors import InputError, first_line
from vivace.lora import peft_file
from vivace.quant.linear import QuantLinear

logger = logging.getLogger(__name__)

FACTOR = re.compile(r"\.lora_(?P<which>A|B)\.(?P<what>weight|bias)$")
OTHER_KINDS = re.compile(r"\.(lokr|hada|oft)_")
"""Adapters of other kinds, whose shapes say nothing about the layer's."""
OURS = re.compile(r"lora|alpha|lokr|hada|oft_|\.diff(_b)?$|norm")
"""What in a file's key is an adapter's; the loaders drop every other key, and `dora_scale`, in silence."""
LISTED = 20
"""Unmatched keys that a warning names."""
REPEATED = ("No LoRA keys associated", "Loading adapter weights from state_dict led to")
"""Starts of diffusers' own warnings, which also come where nothing is wrong; what is wrong is said here."""


@dataclass(kw_only=True)
class Match:
    """How a LoRA's layers fit a pipeline's."""

    matched: int = 0
    unmatched: list[str] = field(default_factory=list)  # keys
    wrong: list[str] = field(default_factory=list)  # what is wrong with layers that do not fit


def load(pipe: Any, source: Any, *args: Any, stock: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
    """`pipe.load_lora_weights(source, ...)`, or `stock` in its place, checked first.

    `source` is a `.safetensors` file, a folder with one, a hub id, or a state dict, in any key format that diffusers
    reads (its own, PEFT's, Kohya's, ComfyUI's). Raises InputError, with the pipeline as it was, for a pickle, a
    file that is cut short, a LoRA of another model, ranks that do not fit together, and values that are not finite.
    Keys that match nothing are listed in a warning.
    """
    if not hasattr(pipe, "load_lora_weights"):
        raise InputError(f"a {type(pipe).__name__} takes no LoRA: diffusers loads none into it")
    name, names = "this LoRA", []
    if not isinstance(source, Mapping):
        name = os.fspath(source)
        source, file = _file(Path(name).expanduser(), kwargs)
        kwargs["use_safetensors"] = True
        names = list(checkpoint.header(file)) if file else []
        if file and peft_file.slot_of(names, _slots(pipe)):
            source = read(pipe, file)
    elif slot := peft_file.slot_of(source, _slots(pipe)):
        source = peft_file.named(source, slot=slot)
    call = stock or pipe.load_lora_weights

    def check(state: dict[str, torch.Tensor]) -> None:
        left_out = [key for key in names if not OURS.search(key) or key.endswith("dora_scale")]
        _check(pipe, name, state, left_out, second=kwargs.get("load_into_transformer_2", False))

    with _checking(pipe, check), _without_repeats():
        try:
            return call(source, *args, **kwargs)
        except InputError:
            raise
        except (OSError, ValueError, KeyError, IndexError, RuntimeError) as error:
            raise InputError(f"{name} does not fit {type(pipe).__name__}: {first_line(error)}") from error


def read(pipe: Any, file: Path) -> dict[str, torch.Tensor]:
    """What a local file holds, under names that `pipe.load_lora_weights` knows."""
    state = load_file(file)
    slot = peft_file.slot_of(state, _slots(pipe))
    return peft_file.named(state, slot=slot, folder=file.parent) if slot else state


def in_few_bits(pipe: Any) -> bool:
    """Whether layers of the pipeline's denoisers are quantised: PEFT adapts those only while it is accelerated."""
    slots = (*getattr(pipe, "_lora_loadable_modules", ()), "transformer_2")
    found = (part for slot in slots if isinstance(part := getattr(pipe, slot, None), torch.nn.Module))
    return any(isinstance(module, QuantLinear) for part in found for module in part.modules())


def _slots(pipe: Any) -> dict[str, torch.nn.Module]:
    """The components that take LoRAs, the denoisers first."""
    found = {slot: getattr(pipe, slot, None) for slot in pipe._lora_loadable_modules}
    return {slot: part for slot, part in found.items() if part is not None}


def _file(path: Path, kwargs: dict[str, Any]) -> tuple[str, Path | None]:
    """The source that diffusers is to read, and which local file that is; one of another kind is refused."""
    weight_name = kwargs.get("weight_name")
    if path.is_dir():
        path = path / kwargs.get("subfolder", "") if kwargs.get("subfolder") else path
        files = sorted(path.glob("*.safetensors"))
        chosen = path / weight_name if weight_name else next(iter(files), None)
        if chosen is None:
            raise InputError(
                f"no .safetensors file in {path}; pickles are refused because loading one can run any code"
            )
        return str(path), chosen if weight_name or len(files) == 1 else None
    if path.exists() or path.suffix.lower() in {".safetensors", *checkpoint.PICKLES}:
        return str(path), path
    if weight_name is not None and not weight_name.endswith(".safetensors"):
        raise InputError(f"{weight_name} is refused: only .safetensors files are loaded, a pickle can run any code")
    return str(path), None


@contextmanager
def _checking(pipe: Any, check: Callable[[dict[str, torch.Tensor]], None]) -> Iterator[None]:
    """Let `check` see every state dict that `pipe` reads within the block, as diffusers converted it."""
    if "lora_state_dict" in vars(pipe):
        # This is the accelerated pipeline's method, called by `load`, which checks already.
        yield
        return
    stock = pipe.lora_state_dict

    def lora_state_dict(*args: Any, **kwargs: Any) -> Any:
        result = stock(*args, **kwargs)
        state = result[0] if isinstance(result, tuple) else result
        check(state)
        _complete(state)
        return result

    pipe.lora_state_dict = lora_state_dict
    try:
        yield
    finally:
        del pipe.lora_state_dict


def _check(pipe: Any, name: str, state: dict[str, torch.Tensor], left_out: list[str], *, second: bool) -> None:
    """Raise InputError where a converted state dict does not fit; warn of keys that match nothing, and drop them."""
    slots = _slots(pipe)
    total = Match(unmatched=list(dict.fromkeys([*left_out, *(k for k in state if k.partition(".")[0] not in slots)])))
    for slot in slots:
        part = {key.removeprefix(f"{slot}."): value for key, value in state.items() if key.startswith(f"{slot}.")}
        component = pipe.transformer_2 if second and slot == "transformer" else slots[slot]
        found = _match(_named_by_peft(part, slot), component, grows=hasattr(pipe, "_maybe_expand_lora_state_dict"))
        total.matched += found.matched
        total.unmatched += [f"{slot}.{key}" for key in found.unmatched]
        total.wrong += [f"{slot}.{what}" for what in found.wrong]
    if total.wrong:
        raise InputError(f"{name} does not fit {type(pipe).__name__}: {total.wrong[0]}")
    if not total.matched:
        example = f", for example {total.unmatched[0]}" if total.unmatched else ""
        raise InputError(f"{name} does not fit {type(pipe).__name__}: none of its layers is there{example}")
    if total.unmatched:
        shown = ", ".join(total.unmatched[:LISTED])
        more = f" and {len(total.unmatched) - LISTED} more" if len(total.unmatched) > LISTED else ""
        logger.warning(
            "%s: %d keys match nothing in a %s and are left out: %s%s",
            *(name, len(total.unmatched), type(pipe).__name__, shown, more),
        )
        for key in total.unmatched:
            # One that diffusers knows nothing of would have it refuse the others.
            state.pop(key, None)


def _complete(state: dict[str, torch.Tensor]) -> None:
    """Give every layer a bias where any has one: PEFT makes all alike, and would leave the others without values."""
    ups = {key.removesuffix("weight"): value for key, value in state.items() if key.endswith(".lora_B.weight")}
    if any(f"{name}bias" in state for name in ups):
        for name, up in ups.items():
            state.setdefault(f"{name}bias", up.new_zeros(up.shape[0]))


def _named_by_peft(part: dict[str, torch.Tensor], slot: str) -> dict[str, torch.Tensor]:
    """One component's keys in PEFT's spelling, which is the last of the conversions that diffusers makes."""
    # Diffusers looks at the first key; some of its own files have one spelling for attention, PEFT's for convolutions.
    if not part or "lora_A" in next(iter(part)) or any(OTHER_KINDS.search(key) for key in part):
        return part
    if slot.startswith("text_encoder"):
        return convert_state_dict_to_peft(convert_state_dict_to_diffusers(part))
    return convert_unet_state_dict_to_peft(part)


def _match(part: Mapping[str, torch.Tensor], component: torch.nn.Module, *, grows: bool) -> Match:
    """Hold one component's LoRA keys against its layers. `grows`: its input layer may be widened to fit (FLUX)."""
    found = Match()
    modules = {name.replace(".base_layer", ""): module for name, module in component.named_modules()}
    for key, value in part.items():
        factor = FACTOR.search(key)
        if factor and not value.is_floating_point():
            found.wrong.append(f"{key} is in {str(value.dtype).removeprefix('torch.')}, no floating point type")
        elif value.is_floating_point() and value.numel() and not _finite(value):
            found.wrong.append(f"{key} holds NaN or infinity; fetch the file again, or train it anew")
        name = key[: factor.start()] if factor else OTHER_KINDS.split(key)[0]
        module = modules.get(name) or modules.get(name.removeprefix("text_model."))
        # FLUX's control LoRAs bring whole norm weights.
        if module is None and (factor or name.rpartition(".")[0] not in modules):
            found.unmatched.append(key)
            continue
        found.matched += 1
        if factor and factor["which"] == "A" and module is not None:
            up = part.get(key.replace(".lora_A.", ".lora_B."))
            if why := _misfit(module, value, up, grows=grows and name == "x_embedder"):
                found.wrong.append(f"{name} {why}")
        elif factor and key.replace(".lora_B.", ".lora_A.").replace(".bias", ".weight") not in part:
            found.wrong.append(f"{name} has a lora_B and no lora_A; fetch the file again")
    return found


def _finite(value: torch.Tensor) -> bool:
    # Nothing compares numbers of 8 bits.
    wide = value.float() if value.itemsize == 1 else value
    return all(end.isfinite() for end in torch.aminmax(wide))


def _misfit(module: Any, down: torch.Tensor, up: torch.Tensor | None, *, grows: bool) -> str | None:
    """Why two factors are none of a layer's, or None."""
    if up is None:
        return "has a lora_A and no lora_B; fetch the file again"
    if down.ndim < 2 or up.ndim < 2 or down.shape[0] != up.shape[1] or not down.shape[0]:
        return f"has factors of shapes {[*down.shape]} and {[*up.shape]}, which share no rank; fetch the file again"
    base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    if isinstance(base, QuantLinear):
        return f"is in {base.format.name}; vivace.accelerate the pipeline first, or take the 16-bit model"
    weight = getattr(base, "weight", None)
    if weight is None or weight.ndim != down.ndim:
        return f"is a {type(module).__name__}, which takes no such factors; is it of another model?"
    made = (up.shape[0], *down.shape[1:])
    # Other libraries keep a linear's weight in shapes of their own.
    shape = (base.out_features, base.in_features) if isinstance(base, torch.nn.Linear) else tuple(weight.shape)
    if made != shape and not grows:
        return f"is {[*shape]} in the model, and the LoRA's {[*made]}; is it of another model?"
    return None


@contextmanager
def _without_repeats() -> Iterator[None]:
    loggers = [
        logging.getLogger(f"diffusers.{name}") for name in ("loaders.peft", "loaders.lora_base", "utils.peft_utils")
    ]

    def keep(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(REPEATED)

    for one in loggers:
        one.addFilter(keep)
    try:
        yield
    finally:
        for one in loggers:
            one.removeFilter(keep)
