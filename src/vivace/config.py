"""What the user asks for: `Config`, and the presets, which are rows of it. Loads no torch."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, Literal

from vivace.attention import BACKENDS
from vivace.cache import Policy, parse, spell
from vivace.errors import InputError
from vivace.memory.placement import budget_of

Switch = Literal["auto", "on", "off"]
"""`auto` decides and says why in the report; `on` is done or is an error; `off` is left alone."""

Quant = Literal["off", "auto", "fp8", "int8", "fp8_weights", "int8_weights", "int4_weights"]
"""`off` leaves linears as they are, `auto` takes 8 bits where they are measured to pay, a format's name takes that one
for every linear that the family does not keep in 16 bit."""

KeepBase = Literal["auto", "file", "host", "no"]
"""`file` where the model's file holds exactly these weights; `host` copies them there; `no` gives them up."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What `accelerate` is asked to do. Every field has a default; the defaults are the preset `exact`."""

    attention: str = "auto"
    """Attention backend: auto, a name of `vivace.attention.BACKENDS`, or auto_fp8: fp8 where it is measured to win."""

    exact_ends: int = 0
    """Steps at each end of a request whose attention stays in 16 bit, where the backend is not exact (fp8, sage)."""

    check_nan: bool = False
    """Stop with the layer, backend and step at the first attention output that is not finite (slow: it waits)."""

    accumulate: Literal["fp32", "fp16"] = "fp32"
    """In what float16 products add up; fp16 is twice as fast on GeForce cards, and not exact."""

    lora: Literal["auto", "merged", "side", "off"] = "auto"
    """LoRA: merged into the weights, at its side as low-rank products, or off: left to PEFT. auto merges."""

    channels_last: Switch = "auto"
    """Store convolution weights in NHWC order."""

    vae: Switch = "auto"
    """The autoencoder's blocks fused, and kept in float16's range where its pipeline would widen it to float32."""

    quant: Quant = "off"
    """Linears in 8 or 4 bits: off, auto, or a name of `vivace.quant.FORMATS`."""

    keep_base: KeepBase = "auto"
    """Where the 16-bit weights of quantised linears stay, for `restore`: auto is file where that is true, else host."""

    encoders: Literal["off", "int8_weights", "fp8_weights", "int4_weights"] = "off"
    """Linears of the text encoders stored in 8 or 4 bits; their originals stay on the host."""

    prompts: Switch = "auto"
    """Keep the embeddings of the last prompts."""

    prompts_mib: float = 64.0
    """Device memory that they may hold, in MiB; the least recently used go first."""

    vram: str | None = None
    """Device memory for the run: a size like 24GB, auto, or a level of `LEVELS`; None: as it is."""

    fuse: Switch = "auto"
    """Hand-fused blocks, for the families that have them."""

    compile: Switch = "auto"
    """Regional torch.compile over the repeated blocks."""

    cache: Policy | None = None
    """Step cache: a policy of `vivace.cache`, or its spelling such as teacache:threshold=0.25; None computes all."""

    graphs: Switch = "auto"
    """CUDA graphs of the denoiser call, one per input signature."""

    graph_gib: float = 4.0
    """Device memory that the CUDA graphs may hold, in GiB; the least recently used go first."""

    def __post_init__(self) -> None:
        if isinstance(self.cache, str):
            object.__setattr__(self, "cache", parse(self.cache))
        for field in dataclasses.fields(self):
            _check(field.name, getattr(self, field.name))


def resolve(preset: str | Config | Mapping[str, Any] | None = None, /, **fields: Any) -> Config:
    """The Config that a preset name, a Config or a mapping of fields stands for, with `fields` replaced.

    Raises InputError for an unknown preset or field, with the nearest name.
    """
    if isinstance(preset, Mapping):
        fields, preset = {**preset, **fields}, None
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise InputError(f"unknown preset {preset!r}; {_nearest(preset, PRESETS)}")
        preset = PRESETS[preset]
    names = [field.name for field in dataclasses.fields(Config)]
    for name in fields:
        if name not in names:
            raise InputError(f"unknown Config field {name!r}; {_nearest(name, names)}")
    if preset is not None and not isinstance(preset, Config):
        raise InputError(
            f"a preset is a name ({', '.join(PRESETS)}), a Config or a mapping of its fields; got {preset!r}"
        )
    return dataclasses.replace(preset or PRESETS["exact"], **fields)


def parse_fields(assignments: Iterable[str]) -> dict[str, Any]:
    """Config fields from `FIELD=VALUE` strings, as the command line's `--set` takes them."""
    types = typing.get_type_hints(Config)
    fields = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise InputError(f"--set takes FIELD=VALUE, got {assignment!r}; for example --set attention=native")
        if name not in types:
            raise InputError(f"unknown Config field {name!r}; {_nearest(name, types)}")
        fields[name] = _parse(name, types[name], text)
    return fields


def preset_name(config: Config) -> str:
    """The name of the preset that `config` is a row of, or `custom`."""
    return next((name for name, row in PRESETS.items() if row == config), "custom")


def plain(config: Config) -> dict[str, Any]:
    """The fields as JSON values; the cache as the command line spells it."""
    return {**dataclasses.asdict(config), "cache": None if config.cache is None else spell(config.cache)}


def _parse(name: str, kind: Any, text: str) -> Any:
    if kind is bool:
        words = {"on": True, "true": True, "off": False, "false": False}
        if text.lower() not in words:
            raise InputError(f"{name} is on or off, got {text!r}; for example --set {name}=on")
        return words[text.lower()]
    if kind in (float, int):
        try:
            return kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise InputError(f"{name} is {what}, got {text!r}; for example --set {name}=4") from None
    return text


def _check(name: str, value: Any) -> None:
    """Raise InputError when `value` is nothing that the field `name` takes."""
    kind = typing.get_type_hints(Config)[name]
    if name == "attention":
        allowed = ("auto", "auto_fp8", *BACKENDS)
        if value not in allowed:
            raise InputError(f"unknown attention backend {value!r}; {_nearest(str(value), allowed)}")
    elif name == "vram":
        if value is not None and value != "auto":
            budget_of(str(value))
    elif typing.get_origin(kind) is Literal:
        allowed = typing.get_args(kind)
        if value not in allowed:
            raise InputError(f"{name} is one of {', '.join(allowed)}, got {value!r}; for example {name}={allowed[0]!r}")
    elif name == "cache":
        if value is not None and not isinstance(value, Policy):
            raise InputError(f"cache is a policy or its spelling, got {value!r}; for example cache='firstblock'")
    elif kind is bool and not isinstance(value, bool):
        raise InputError(f"{name} is True or False, got {value!r}; for example {name}=True")
    elif kind is int and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise InputError(f"{name} is a whole number of at least 0, got {value!r}; for example {name}=2")
    elif kind is float and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < inf):
        raise InputError(f"{name} is a finite number above 0, got {value!r}; for example {name}=4.0")


def _nearest(name: str, known: Iterable[str]) -> str:
    known = tuple(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return f"the nearest is {near!r} (known: {', '.join(known)})"


PRESETS: Mapping[str, Config] = {
    "exact": Config(),
    "balanced": Config(quant="auto"),
    # A step cache joins the row when one is measured to cost at most a point.
    "fast": Config(quant="auto", attention="auto_fp8", exact_ends=2),
}
"""Named rows of Config, from the nearest to stock to the furthest from it."""
