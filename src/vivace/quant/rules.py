"""Which linears gain from 8-bit products, and how they are scaled: rows of measurements, by GPU and shape."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vivace.quant.format import Format, How, capability


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One row: linears of at least so many weights, or of exactly this shape, in `format` on such a GPU."""

    format: str
    sm: tuple[int, int] | None = None  # exactly this compute capability; None: any
    shape: tuple[int, int] | None = None  # exactly these outputs and inputs; None: any
    weights: int = 0  # at least so many
    how: How | None  # None: 16 bit is quicker
    why: str

    def holds(self, *, outputs: int, inputs: int, format: Format, device: torch.device) -> bool:
        return (
            self.format == format.name
            and device.type == "cuda"
            and self.sm in (None, capability(device))
            and self.shape in (None, (outputs, inputs))
            and outputs * inputs >= self.weights
        )


# The first row that holds counts; without one, 16 bit. TFLOP/s are an H200's.
RULES: tuple[Rule, ...] = (
    Rule(format="fp8", sm=(9, 0), shape=(13824, 5120), how="tensorwise", why="1294 TFLOP/s, rowwise 1060"),
    Rule(format="fp8", sm=(9, 0), shape=(5120, 13824), how="rowwise, exact accumulation",
         why="1311 TFLOP/s, and fast accumulation is no faster this deep"),
    Rule(format="fp8", shape=(1280, 2048), how=None, why="text keys and values: 154 rows are all launch time"),
    Rule(format="int8", shape=(1280, 2048), how=None, why="text keys and values: 154 rows are all launch time"),
    # SDXL's 1280 x 1280 and larger; its 640 x 640 takes 8 us less in fp8 and 6 more to quantise.
    Rule(format="fp8", weights=1_600_000, how="rowwise", why="738 to 1500 TFLOP/s, bf16 488 to 812"),
    Rule(format="int8", weights=1_600_000, how="rowwise", why="twice the 16-bit rate on paper; not measured"),
    # What reads one row a sample: a third of FLUX's bytes at half of them; 384 x 55296 in bf16 on a CPU 2 ms for 16.
    Rule(format="int8_weights", weights=1_600_000, how="rowwise", why="half the bytes to read; not measured"),
)  # fmt: skip


def rule_for(*, outputs: int, inputs: int, format: Format, device: torch.device) -> Rule | None:
    """The row for a linear [outputs, inputs] in `format` on `device`, or None: it is not measured to pay."""
    facts = {"outputs": outputs, "inputs": inputs, "format": format, "device": device}
    return next((rule for rule in RULES if rule.holds(**facts)), None)


def best_format(device: torch.device) -> str | None:
    """What `quant="auto"` takes on a device: fp8 from Ada on, int8 from Turing on, else nothing."""
    if device.type != "cuda":
        return None
    sm = capability(device)
    return "fp8" if sm >= (8, 9) else "int8" if sm >= (7, 5) else None
