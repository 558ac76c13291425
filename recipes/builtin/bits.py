"""Measure what 8 bits cost the built-in model: linears in fp8 and int8, fp8 attention, and both presets that use them.

    python recipes/builtin/bits.py --captions 4000 --out benchmarks

For each: caption accuracy with the paired interval of its difference from exact on the same captions and noise, FID,
PSNR mean and worst beside the noise floor, which is stock diffusers at another batch size. The bar is an interval
within a point of exact. What the device cannot do is said and left out. What is done is kept: run again, it goes on.

fp8 attention leaves calls of few keys to native, which all of this model's are: there it gains nothing. To see what it
costs, its rows have every call in fp8; `balanced` and `fast` are as users have them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from paired import Bench, beside_exact, options

from vivace.attention import cudnn_fp8
from vivace.config import PRESETS, Config
from vivace.errors import InputError

WAYS: Mapping[str, Config] = {
    "fp8": Config(quant="fp8"),
    "int8": Config(quant="int8"),
    "fp8 attention in every call": Config(attention="cudnn_fp8", exact_ends=0),
    "the same, two steps at both ends in 16 bit": Config(attention="cudnn_fp8", exact_ends=2),
    "the same, and fp8": Config(quant="fp8", attention="cudnn_fp8", exact_ends=2),
    "balanced": PRESETS["balanced"],
    "fast": PRESETS["fast"],
}
BAR = -1.0  # points: the lower end of the paired interval


def main() -> None:
    given = options(__doc__, name="bits").parse_args()
    bench = Bench(given)
    rows = [bench.measure("exact", bench.ours(), role="exact")]
    rows.append(bench.measure("noise floor: stock", stock(), role="floor", batch=max(1, given.batch // 2)))
    for name, config in WAYS.items():
        try:
            rows.append(bench.measure(name, in_bits(bench, config), role="bits"))
        except InputError as error:
            print(f"{name}: {error}")
    table = judged([row for row in rows if row])
    file = bench.write(table, name="bits", out=given.out)
    print(markdown(table))
    print(file)
    if bench.left:
        print(f"{bench.left} left for the next time, when the same command goes on")


@contextmanager
def in_bits(bench: Bench, config: Config) -> Iterator[Callable[[int], float]]:
    """Accelerated so; fp8 attention that is asked for by name also where it has nothing to gain."""
    usual = cudnn_fp8.KEYS
    cudnn_fp8.KEYS = 1 if config.attention == "cudnn_fp8" else usual
    try:
        with bench.ours(config) as computed:
            yield computed
    finally:
        cudnn_fp8.KEYS = usual


@contextmanager
def stock() -> Any:
    """The pipeline as diffusers has it."""
    yield float


def judged(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows beside exact; whether those in few bits are within the bar."""
    found = [beside_exact(row) for row in rows]
    return [
        {**row, **({"within_a_point": row["difference_interval"][0] >= BAR} if row["role"] == "bits" else {})}
        for row in found
    ]


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of the notes."""
    lines = [
        "| built-in model | speed | accuracy | difference from exact | within a point | FID | PSNR | worst |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["difference_interval"]
        distance = "" if row["fid"] is None else f"{row['fid']:.2f}"
        within = {True: "yes", False: "no", None: ""}[row.get("within_a_point")]
        lines.append(
            f"| {row['name']} | {row['speedup']:.2f} | {row['accuracy']:.1f} % | {row['difference']:+.1f} "
            f"({low:+.1f} to {high:+.1f}) | {within} | {distance} | {row['psnr']:.1f} | {row['psnr_worst']:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
