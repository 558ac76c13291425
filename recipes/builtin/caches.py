"""Measure every step cache on the built-in model, beside both controls, on captions it never saw.

    vivace calibrate builtin --captions 48 -o src/vivace/cache/calibrations/builtin.json
    python recipes/builtin/caches.py --captions 4000 --out benchmarks

For each cache: evaluations of the denoiser, time, caption accuracy with the paired interval of its difference from
exact, FID, PSNR mean and worst. A cache counts where it beats both controls, Euler with fewer steps and the best
solver with fewer steps, in PSNR and accuracy at its own time. cache-dit's DBCache on stock diffusers is the peer, where
it is installed: set it beside ours at as many evaluations. What is done is kept: run again, it goes on.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch

import vivace
from vivace.accelerate import acceleration_of
from vivace.builtin.judge import judge
from vivace.builtin.reader import FEATURES, load_reader, read
from vivace.cache import parse
from vivace.cache.calibration import SHIPPED
from vivace.errors import InputError
from vivace.evals.accuracy import Accuracy, compare
from vivace.evals.builtin import Exam, draw_exam, rendered
from vivace.evals.contest import contents_of, place_of
from vivace.evals.fid import Moments, fid
from vivace.evals.pairwise import psnr
from vivace.evals.sample import sample
from vivace.evals.store import key_of, slug
from vivace.fingerprint import fingerprint
from vivace.load import find
from vivace.machine import machine
from vivace.scheduler import use_scheduler

STEPS = 28
CACHES = (
    "planned:computed=0.67", "planned:computed=0.5", "planned:computed=0.36", "planned:computed=0.25",
    "steps:compute=0+2+4+6+8+10+12+14+16+18+20+22+24+26,order=1",
    "firstblock:threshold=0.1", "firstblock:threshold=0.2", "firstblock:threshold=0.3",
    "firstblock:threshold=0.2,order=1",
    "teacache:threshold=0.1", "teacache:threshold=0.2", "teacache:threshold=0.4",
    "dicache:threshold=0.1", "dicache:threshold=0.3",
    "taylorseer:interval=2", "taylorseer:interval=3", "taylorseer:interval=3,order=2",
    "meancache:of50=25", "meancache:of50=17", "meancache:of50=10",
    "blockdance:after=4", "pab:warmup=3,cooldown=3", "guidance:every=2", "guidance:every=4", "guidance:end=0.8,every=1",
)  # fmt: skip
PEERS = (0.1, 0.2, 0.3, 0.4)  # cache-dit's residual_diff_threshold, with one block computed and two steps of warm-up
CONTROLS = (20, 16, 14, 12, 10, 8, 7)  # steps
VERDICTS = {True: "yes", False: "no", None: ""}
SOLVERS = ("unipc", "dpmsolvermultistep")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--captions", type=int, default=4000)
    arguments.add_argument("--batch", type=int, default=50)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--device")
    arguments.add_argument("--out", type=Path, default=Path("benchmarks"))
    given = arguments.parse_args()
    exam = draw_exam(given.captions, seed=given.seed)
    pipe: Any = vivace.load("builtin", device=given.device)
    pipe.set_progress_bar_config(disable=True)
    bench = Bench(pipe, exam, batch=given.batch, seed=given.seed, state=Path("out/caches"))
    exact = bench.measure("exact")
    rows = [exact]
    for steps in CONTROLS:
        rows += [
            bench.measure(f"{solver or 'euler'}, {steps} steps", steps=steps, solver=solver)
            for solver in (None, *SOLVERS)
        ]
    for cache in CACHES:
        try:
            rows.append(bench.measure(cache, cache=cache))
        except InputError as error:
            print(f"{cache}: {error}")
    if importlib.util.find_spec("cache_dit") is None:
        print("cache-dit is not installed; pip install cache-dit to have it in the table")
    else:
        rows += [bench.measure(f"cache-dit, {threshold}", peer=threshold) for threshold in PEERS]
    table = judged(rows)
    place = (
        torch.cuda.get_device_name(pipe.device).replace("NVIDIA ", "").lower() if pipe.device.type == "cuda" else "cpu"
    )
    file = given.out / f"{date.today()}-{place.replace(' ', '-')}-builtin-caches.json"
    about = {"command": f"python recipes/builtin/caches.py --captions {given.captions} --batch {given.batch}"}
    file.write_text(json.dumps({**about, "machine": machine(), "rows": table}, indent=1) + "\n")
    print(markdown(table))
    print(file)


class Bench:
    """The pipeline, the captions, and the exact pictures that others are compared with."""

    def __init__(self, pipe: Any, exam: Exam, *, batch: int, seed: int, state: Path) -> None:
        self.pipe, self.exam, self.batch, self.seed, self.state = pipe, exam, batch, seed, state
        self.reader = load_reader(device=pipe.device)
        self.exact: list[torch.Tensor] = []  # 8-bit pictures, batch by batch
        # What a row is of, beside its name: a model or a calibration made anew has none yet.
        self.key = key_of(
            {
                "model": contents_of(find("builtin")), "calibrations": fingerprint(SHIPPED), "place": place_of(pipe),
                "captions": len(exam.captions), "batch": batch, "seed": seed,
            }
        )  # fmt: skip
        self.real = Moments.of(rendered(draw_exam(len(exam.captions), seed=seed + 1), self.reader))
        state.mkdir(parents=True, exist_ok=True)

    def measure(
        self,
        name: str,
        *,
        cache: str | None = None,
        peer: float | None = None,
        steps: int = STEPS,
        solver: str | None = None,
    ) -> dict[str, Any]:
        """One row; read back where an earlier run measured it of the same things."""
        file = self.state / f"{slug(name)}-{self.key}.json"
        if file.is_file() and name != "exact":
            return json.loads(file.read_text())
        role = "cache" if cache else "peer" if peer else "exact" if name == "exact" else "control"
        with self._ours(cache, solver) if peer is None else self._peer(peer) as computed:
            row = {"name": name, "role": role, **self._run(steps, computed)}
        file.write_text(json.dumps(row))
        print(f"{name}: {row['seconds']:.4f} s a picture, {row['accuracy']:.1f} %, {row['psnr']:.1f} dB", flush=True)
        return row

    @contextmanager
    def _ours(self, cache: str | None, solver: str | None) -> Iterator[Callable[[int], float]]:
        """The pipeline accelerated; gives how many of a call's steps were evaluated."""
        stock = self.pipe.scheduler
        try:
            if solver:
                use_scheduler(self.pipe, solver, prediction="flow")
            vivace.accelerate(self.pipe, cache=None if cache is None else parse(cache))
            yield lambda steps: _computed(self.pipe, steps)
        finally:
            vivace.restore(self.pipe)
            self.pipe.scheduler = stock

    @contextmanager
    def _peer(self, threshold: float) -> Iterator[Callable[[int], float]]:
        """Stock diffusers under cache-dit; gives how many of a call's steps were evaluated."""
        import cache_dit

        settings = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "max_warmup_steps": 2}
        config = cache_dit.DBCacheConfig(**settings, residual_diff_threshold=threshold)
        cache_dit.enable_cache(self.pipe, cache_config=config)
        try:
            yield lambda steps: float(steps - len(cache_dit.summary(self.pipe, logging=False)[0].cached_steps))
        finally:
            cache_dit.disable_cache(self.pipe)

    def _run(self, steps: int, computed: Callable[[int], float]) -> dict[str, Any]:
        right, distances, features, seconds, evaluations = [], [], [], 0.0, []
        exact = not self.exact
        batches = [slice(first, first + self.batch) for first in range(0, len(self.exam.captions), self.batch)]
        self._draw(batches[0], steps)
        for number, chosen in enumerate(batches):
            started = time.perf_counter()
            pictures = self._draw(chosen, steps)
            seconds += time.perf_counter() - started
            pixels = (pictures * 255).round().to(torch.uint8)
            if exact:
                self.exact.append(pixels)
            distances.append(psnr(pixels.float() / 255, self.exact[number].float() / 255))
            on_device = pictures.to(self.pipe.device)
            verdicts = map(judge, read(self.reader, on_device), self.exam.said[chosen])
            right += [verdict["right"] for verdict in verdicts]
            with torch.no_grad():
                features.append(self.reader.features(on_device).double().cpu())
            evaluations.append(computed(steps))
        decibels = torch.cat(distances)
        accuracy = Accuracy.of(right)
        return {
            "seconds": seconds / len(self.exam.captions), "steps": steps,
            "evaluations": sum(evaluations) / len(evaluations),
            "accuracy": 100 * accuracy.share, "interval": [100 * end for end in accuracy.interval], "right": right,
            "fid": fid(Moments.of(torch.cat(features)), self.real) if len(right) > FEATURES else None,
            "psnr": decibels.mean().item(), "psnr_worst": decibels.min().item(),
        }  # fmt: skip

    def _draw(self, chosen: slice, steps: int) -> torch.Tensor:
        captions = self.exam.captions[chosen]
        return sample(self.pipe, captions, steps=steps, seed=self.seed + chosen.start, guidance_scale=3.0).pictures


def _computed(pipe: Any, steps: int) -> float:
    """Evaluations of the denoiser at the last call, of `steps`."""
    acceleration = acceleration_of(pipe)
    assert acceleration is not None
    (lane,) = acceleration.target.lanes.values()
    if lane.cache is None:
        return float(steps)
    count = lane.cache.tally.last
    return steps * count.computed / (count.computed + count.skipped)


def judged(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows beside exact and, for caches, beside what the controls reach in the same time."""
    exact = rows[0]
    curves = {
        kind: [
            row
            for row in rows
            if row["role"] in ("exact", "control") and (row is exact or row["name"].startswith(kind))
        ]
        for kind in ("euler", *SOLVERS)
    }
    found = []
    for row in rows:
        paired = compare(row["right"], exact["right"])
        beside = {
            kind: {what: at_time(curve, row["seconds"], what) for what in ("psnr", "accuracy")}
            for kind, curve in curves.items()
            if row["role"] == "cache"
        }
        beats = all(row[what] > control[what] for control in beside.values() for what in control)
        found.append(
            {
                **{name: value for name, value in row.items() if name != "right"},
                "speedup": exact["seconds"] / row["seconds"],
                "difference": 100 * paired.difference,
                "difference_interval": [100 * end for end in paired.interval],
                **({"controls_at_its_time": beside, "beats_controls": beats} if beside else {}),
            }
        )
    return found


def at_time(curve: Sequence[dict[str, Any]], seconds: float, what: str) -> float:
    """`what` of a control that takes `seconds`, between the measured ones; exact itself bounds it above."""
    points = sorted((row["seconds"], min(row[what], 99.0)) for row in curve)
    place = bisect_left(points, (seconds, 0.0))
    if place in (0, len(points)):
        return points[min(place, len(points) - 1)][1]
    (before, low), (after, high) = points[place - 1 : place + 1]
    return low + (high - low) * (seconds - before) / (after - before)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table of the notes."""
    lines = [
        "| contestant | evaluations | speed | accuracy | difference from exact | FID | PSNR | worst | beats controls |",
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
