"""How long a model takes from `accelerate` to the end of its first forward: measurements, by what is done to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vivace.passes.channels_last import convolutions

if TYPE_CHECKING:
    from vivace.passes.target import Target

MACHINE = "an H200 with 16 processors"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One row: denoisers to which the pass `does` is done took between these `seconds`."""

    does: str
    convolutional: bool | None = None  # None: of either kind
    seconds: tuple[float, float]


# FLUX, SDXL, SD 1.5, SD 3.5 medium, PixArt and Qwen-Image on `MACHINE`, caches empty. The first row that holds counts.
RULES: tuple[Rule, ...] = (
    Rule(does="compile", seconds=(12.0, 17.0)),
    Rule(does="fuse", convolutional=True, seconds=(7.0, 11.0)),
    Rule(does="quant", seconds=(5.5, 11.5)),
    Rule(does="fuse", seconds=(3.5, 5.5)),
)


def cold_start(target: Target) -> tuple[float, float] | None:
    """The least and the most seconds that the passes noted as done will take here: 0 where nothing is compiled.

    None where that was not measured.
    """
    done = {note.name for note in target.notes if note.done}
    if target.device.type != "cuda":
        return None if "compile" in done else (0.0, 0.0)
    if done.isdisjoint({"compile", "fuse"}):
        return 0.0, 0.0
    convolutional = any(convolutions(denoiser) for denoiser in target.denoisers.values())
    rows = (rule for rule in RULES if rule.does in done and rule.convolutional in (None, convolutional))
    return next((rule.seconds for rule in rows), None)


def told(seconds: tuple[float, float] | None) -> str:
    """`cold_start`'s forecast in words."""
    if seconds is None:
        return "not measured here"
    least, most = seconds
    return f"{least:g} to {most:g} s with empty caches on {MACHINE}" if most else "nothing to compile"
