"""Measure every step cache on the built-in model, beside both controls, on captions it never saw.

    make calibrations
    python recipes/builtin/caches.py --captions 4000 --out benchmarks

For each cache: evaluations of the whole denoiser (what it computes of the other steps, a block or half of guidance, is
in its time), time, caption accuracy with the paired interval of its difference from exact, FID, PSNR mean and worst. A
cache counts where it beats both controls, Euler with fewer steps and the best solver with fewer steps, in PSNR and
accuracy at its own time. cache-dit's DBCache on stock diffusers is the peer, where it is installed: set it beside ours
at as many evaluations. What is done is kept: run again, it goes on.

A GPU draws so small a model so quickly that text, decoder and the loop around it are two thirds of a picture's time,
and evaluations saved save little: cache_times.py has the verdict where the model is nearly all of it.
"""

from __future__ import annotations

import importlib.util
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from paired import STEPS, Bench, Way, accelerated, beside_exact, options

from vivace.cache import parse
from vivace.cache.calibration import SHIPPED
from vivace.errors import InputError
from vivace.fingerprint import fingerprint

EVERY_OTHER = "steps:compute=0+2+4+6+8+10+12+14+16+18+20+22+24+26,order=1"
CACHES = (
    "planned:computed=0.67", "planned:computed=0.5", "planned:computed=0.36", "planned:computed=0.25",
    EVERY_OTHER,
    "firstblock:threshold=0.1", "firstblock:threshold=0.2", "firstblock:threshold=0.3",
    "firstblock:threshold=0.2,order=1",
    "teacache:threshold=0.02", "teacache:threshold=0.04", "teacache:threshold=0.08",
    "dicache:threshold=0.1", "dicache:threshold=0.3",
    "taylorseer:interval=2", "taylorseer:interval=3", "taylorseer:interval=3,order=2",
    "meancache:of50=25", "meancache:of50=17", "meancache:of50=10",
    "blockdance:after=4", "pab:warmup=3,cooldown=3", "guidance:every=2", "guidance:every=4", "guidance:end=0.8,every=1",
)  # fmt: skip
ON_SOLVER = (
    "planned:computed=0.67", "planned:computed=0.5", "planned:computed=0.36", EVERY_OTHER, "taylorseer:interval=2",
    "guidance:every=2",
)  # fmt: skip  # with the last of SOLVERS
PEERS = (0.1, 0.2, 0.3, 0.4)  # cache-dit's residual_diff_threshold, with one block computed and two steps of warm-up
CONTROLS = (20, 16, 14, 12, 10, 8, 7)  # steps
SOLVERS = ("unipc", "dpmsolvermultistep")
VERDICTS = {True: "yes", False: "no", None: ""}


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """The pipeline at `exact` with a cache, or a control with fewer steps."""

    solver: str | None = None
    cache: str | None = None
    steps: int = STEPS

    @property
    def name(self) -> str:
        kind = [self.solver] if self.solver else [] if self.cache else ["euler"]
        return ", ".join([*kind, self.cache or f"{self.steps} steps"])

    @property
    def role(self) -> str:
        return "cache" if self.cache else "control"

    @property
    def of(self) -> str:
        """The built-in model's calibration, where the cache reads it."""
        return fingerprint(SHIPPED) if (self.cache or "").startswith(("planned", "teacache")) else ""

    def way(self, pipe: Any) -> Way:
        """Raises InputError for what this pipeline cannot have."""
        return accelerated(pipe, solver=self.solver, **({"cache": parse(self.cache)} if self.cache else {}))


CONTESTANTS = (
    *(Contestant(cache=cache) for cache in CACHES),
    *(Contestant(solver=SOLVERS[-1], cache=cache) for cache in ON_SOLVER),
    *(Contestant(solver=solver, steps=steps) for steps in CONTROLS for solver in (None, *SOLVERS)),
)


def main() -> None:
    given = options(__doc__, name="caches").parse_args()
    bench = Bench(given)
    rows = [bench.measure("exact", bench.ours(), role="exact")]
    for one in CONTESTANTS:
        try:
            rows.append(bench.measure(one.name, one.way(bench.pipe), role=one.role, steps=one.steps, of=one.of))
        except InputError as error:
            print(f"{one.name}: {error}")
    if importlib.util.find_spec("cache_dit") is None:
        print("cache-dit is not installed; pip install cache-dit to have it in the table")
    else:
        rows += [bench.measure(f"cache-dit, {one}", peer(bench.pipe, one), role="peer") for one in PEERS]
    table = judged([row for row in rows if row], complete=not bench.left)
    file = bench.write(table, name="caches", out=given.out)
    print(markdown(table))
    print(file)
    if bench.left:
        print(f"{bench.left} left for the next time, when the same command goes on")


@contextmanager
def peer(pipe: Any, threshold: float) -> Iterator[Callable[[int], float]]:
    """Stock diffusers under cache-dit; gives how many of a call's steps were evaluated."""
    import cache_dit

    settings = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "max_warmup_steps": 2}
    config = cache_dit.DBCacheConfig(**settings, residual_diff_threshold=threshold)
    cache_dit.enable_cache(pipe, cache_config=config)
    try:
        yield lambda steps: float(steps - len(cache_dit.summary(pipe, logging=False)[0].cached_steps))
    finally:
        cache_dit.disable_cache(pipe)


def judged(rows: Sequence[dict[str, Any]], *, complete: bool = True) -> list[dict[str, Any]]:
    """The rows beside exact and, for caches, beside what the controls reach in the same time.

    While rows are left that is not judged: nothing has beaten a control that is still to be measured.
    """
    shares = {row["name"]: row["seconds"] / row["exact_seconds"] for row in rows}  # exact's of the same run
    verdicts = verdicts_at(rows, shares) if complete else {}
    return [{**beside_exact(row), **verdicts.get(row["name"], {})} for row in rows]


def verdicts_at(rows: Sequence[dict[str, Any]], shares: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Name of a cache -> what the controls reach in its share of exact's time, and whether it beats them all."""
    exact = rows[0]
    timed = [row for row in rows if row["name"] in shares]
    curves = {
        kind: [row for row in timed if row is exact or (row["role"] == "control" and row["name"].startswith(kind))]
        for kind in ("euler", *SOLVERS)
    }
    found = {}
    for row in timed:
        if row["role"] == "cache":
            beside = {
                kind: {what: at_time(curve, shares, shares[row["name"]], what) for what in ("psnr", "accuracy")}
                for kind, curve in curves.items()
            }
            beats = all(row[what] > control[what] for control in beside.values() for what in control)
            found[row["name"]] = {"controls_at_its_time": beside, "beats_controls": beats}
    return found


def at_time(curve: Sequence[dict[str, Any]], shares: Mapping[str, float], share: float, what: str) -> float:
    """`what` of a control in that share of exact's time, between the measured; exact itself bounds it above."""
    points = sorted((shares[row["name"]], min(row[what], 99.0)) for row in curve)
    place = bisect_left(points, (share, 0.0))
    if place in (0, len(points)):
        return points[min(place, len(points) - 1)][1]
    (before, low), (after, high) = points[place - 1 : place + 1]
    return low + (high - low) * (share - before) / (after - before)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table of the notes."""
    lines = [
        "| contestant | whole evaluations | speed | accuracy | difference from exact | FID | PSNR | worst "
        "| beats controls |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["difference_interval"]
        distance = "" if row["fid"] is None else f"{row['fid']:.2f}"
        lines.append(
            f"| {row['name']} | {row['evaluations']:.1f} | {row['speedup']:.2f} | {row['accuracy']:.1f} % "
            f"| {row['difference']:+.1f} ({low:+.1f} to {high:+.1f}) | {distance} | {row['psnr']:.1f} "
            f"| {row['psnr_worst']:.1f} | {VERDICTS[row.get('beats_controls')]} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
