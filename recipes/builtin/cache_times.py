"""Time the contestants of caches.py where the model is nearly all of a picture's time, and judge the caches there.

    python recipes/builtin/cache_times.py --table benchmarks/2026-11-23-h200-builtin-caches.json --out benchmarks

Accuracy and PSNR are the table's. All take turns, round by round; in each a contestant is held against exact just
before and just after it, since the speed of a machine drifts. Its share of exact's time is the median of the rounds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from statistics import fmean, median
from typing import Any

from caches import CONTESTANTS, VERDICTS, Contestant, verdicts_at
from paired import STEPS, Way, accelerated

import vivace
from vivace.evals.builtin import draw_exam
from vivace.evals.contest import place_of
from vivace.evals.sample import sample
from vivace.machine import machine

TOGETHER = 3  # contestants between two of exact


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--table", type=Path, required=True, help="what caches.py wrote")
    asked.add_argument("--batch", type=int, default=4, help="captions of a call")
    asked.add_argument("--rounds", type=int, default=3)
    asked.add_argument("--device", default="cpu")
    asked.add_argument("--out", type=Path, default=Path("benchmarks"))
    given = asked.parse_args()
    table = json.loads(given.table.read_text("utf-8"))["rows"]
    clock = Clock(given.device, batch=given.batch)
    listed = {row["name"] for row in table}
    contestants = [one for one in CONTESTANTS if one.name in listed]
    rounds = [dict(clock.round(contestants)) for _ in range(given.rounds)]
    rows = judged(table, rounds)
    file = given.out / f"{date.today()}-{given.device}-builtin-cache-times.json"
    about = {
        "command": f"python recipes/builtin/cache_times.py --table {given.table} --batch {given.batch} "
        f"--rounds {given.rounds} --device {given.device}",
        "machine": machine(), "place": place_of(clock.pipe), "exact_seconds": clock.exact, "rows": rows,
    }  # fmt: skip
    given.out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    print(markdown(rows))
    print(file)


class Clock:
    """One call of the pipeline, timed."""

    def __init__(self, device: str, *, batch: int) -> None:
        self.pipe: Any = vivace.load("builtin", device=device)
        self.pipe.set_progress_bar_config(disable=True)
        self.captions = draw_exam(batch, seed=0).captions
        self.exact: list[float] = []
        """Exact's seconds a picture, one after the other."""

    def round(self, contestants: Sequence[Contestant]) -> Iterator[tuple[str, float]]:
        """Each one's name, and its share of exact's time."""
        self.exact.append(self.seconds(accelerated(self.pipe), STEPS))
        for first in range(0, len(contestants), TOGETHER):
            some = contestants[first : first + TOGETHER]
            taken = [self.seconds(one.way(self.pipe), one.steps) for one in some]
            self.exact.append(self.seconds(accelerated(self.pipe), STEPS))
            for one, seconds in zip(some, taken, strict=True):
                share = seconds / fmean(self.exact[-2:])
                print(f"{one.name}: {seconds:.3f} s a picture, {share:.3f} of exact", flush=True)
                yield one.name, share

    def seconds(self, way: Way, steps: int) -> float:
        """Of a picture, in the second of two calls."""
        with way:
            for _ in range(2):
                began = time.perf_counter()
                sample(self.pipe, self.captions, steps=steps, seed=0, guidance_scale=3.0)
                taken = time.perf_counter() - began
        return taken / len(self.captions)


def judged(table: Sequence[dict[str, Any]], rounds: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """Name, share of exact's time with its rounds, evaluations, and for caches whether they beat the controls."""
    shares = {"exact": 1.0, **{name: median(one[name] for one in rounds) for name in rounds[0]}}
    verdicts = verdicts_at(table, shares)
    return [
        {
            "name": row["name"], "evaluations": row["evaluations"], "share": shares[row["name"]],
            "rounds": [one[row["name"]] for one in rounds if row["name"] in one],
            "accuracy": row["accuracy"], "psnr": row["psnr"], **verdicts.get(row["name"], {}),
        }
        for row in table if row["name"] in shares
    ]  # fmt: skip


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| contestant | evaluations | speed | accuracy | PSNR | beats controls |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {row['name']} | {row['evaluations']:.1f} | {1 / row['share']:.2f} | {row['accuracy']:.1f} % "
        f"| {row['psnr']:.1f} | {VERDICTS[row.get('beats_controls')]} |"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
