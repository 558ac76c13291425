"""Contestants draw the same captions from the same noise as exact does, and are compared with it caption by caption.

Rows are kept in one file, a line each, as soon as they are measured: run again, a bench goes on, and a file that was
carried to another machine of the same kind goes on there. Times are held against exact's of the same run.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import date
from pathlib import Path
from typing import Any

import torch

import vivace
from vivace.accelerate import acceleration_of
from vivace.builtin.judge import judge
from vivace.builtin.reader import FEATURES, load_reader, read
from vivace.config import Config
from vivace.evals.accuracy import Accuracy, compare
from vivace.evals.builtin import draw_exam, rendered
from vivace.evals.contest import contents_of, place_of
from vivace.evals.fid import Moments, fid
from vivace.evals.pairwise import psnr
from vivace.evals.sample import sample
from vivace.evals.store import key_of
from vivace.load import find
from vivace.machine import machine
from vivace.scheduler import use_scheduler

STEPS = 28
Way = AbstractContextManager[Callable[[int], float]]
"""The pipeline made ready; gives how many of a call's steps were evaluated."""


def options(about: str | None, *, name: str) -> argparse.ArgumentParser:
    """What such a bench can be asked; `name` is of its files."""
    asked = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--captions", type=int, default=4000)
    asked.add_argument("--batch", type=int, default=50)
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--device")
    asked.add_argument("--budget-s", type=float, help="seconds after which no row is begun; the rest next time")
    asked.add_argument("--state", type=Path, default=Path(f"out/{name}.jsonl"), help="the rows that are measured")
    asked.add_argument("--out", type=Path, default=Path("benchmarks"))
    return asked


@contextmanager
def accelerated(
    pipe: Any, preset: str | Config = "exact", /, *, solver: str | None = None, **fields: Any
) -> Iterator[Callable[[int], float]]:
    """The pipeline accelerated by that preset, with these fields of its Config, and with another solver."""
    stock = pipe.scheduler
    try:
        if solver:
            use_scheduler(pipe, solver, prediction="flow")
        vivace.accelerate(pipe, preset, **fields)
        yield lambda steps: _computed(pipe, steps)
    finally:
        vivace.restore(pipe)
        pipe.scheduler = stock


class Rows:
    """The rows of one bench in a file; those with another key are of other things."""

    def __init__(self, file: Path, *, key: str) -> None:
        self.file, self.key = file, key

    def kept(self) -> Iterator[dict[str, Any]]:
        """Every row so far, with what exact, which begins each run, had right in the row's own run."""
        text = self.file.read_text("utf-8") if self.file.is_file() else ""
        exact = ""
        for line in text.splitlines():
            with suppress(ValueError):  # a line that was cut short
                row = json.loads(line)
                if row.pop("key") == self.key:
                    right = f"{int(row['right'], 16):b}"[1:]
                    exact = right if row["role"] == "exact" else exact
                    yield {**row, "right": right, "exact_right": exact}

    def keep(self, row: Mapping[str, Any]) -> None:
        """One row more."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            # The newline comes first: a machine that stopped may have left half a line. Verdicts four to a digit, after
            # a 1 that keeps the zeros: small enough to be committed.
            packed = f"{int('1' + row['right'], 2):x}"
            file.write("\n" + json.dumps({"key": self.key, **row, "right": packed}))


class Bench:
    """The pipeline, the captions, and the exact pictures that others are compared with."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.began, self.longest, self.left = time.monotonic(), 0.0, 0
        self.budget, self.batch, self.seed = given.budget_s, given.batch, given.seed
        self.exam = draw_exam(given.captions, seed=given.seed)
        self.pipe: Any = vivace.load("builtin", device=given.device)
        self.pipe.set_progress_bar_config(disable=True)
        self.reader = load_reader(device=self.pipe.device)
        self.exact: list[torch.Tensor] = []  # 8-bit pictures, batch by batch
        self.usual = 0.0  # exact's seconds a picture in this run
        self.right = ""  # and its verdicts
        # What every row is of, beside its name: a model made anew has none yet.
        key = key_of(
            {
                "model": contents_of(find("builtin")), "place": place_of(self.pipe),
                "captions": given.captions, "batch": given.batch, "seed": given.seed,
            }
        )  # fmt: skip
        self.rows = Rows(given.state, key=key)
        self.known = {(row["name"], row["of"]): row for row in self.rows.kept()}
        self.real = Moments.of(rendered(draw_exam(given.captions, seed=given.seed + 1), self.reader))

    def measure(
        self, name: str, way: Way, *, role: str, steps: int = STEPS, batch: int | None = None, of: str = ""
    ) -> dict[str, Any] | None:
        """One row; read back where an earlier run measured it of the same things, None where no time is left for it.

        "exact", which comes first, is drawn in every run. `batch` captions are drawn at a time. `of` is what else makes
        the row what it is, such as the contents of a calibration.
        """
        if (name, of) in self.known and self.exact:
            return self.known[name, of]
        began = time.monotonic()
        if self.budget is not None and self.exact and began - self.began + self.longest > self.budget:
            self.left += 1
            return None
        with way as computed:
            row = {"name": name, "of": of, "role": role, **self._run(steps, computed, batch or self.batch)}
        self.usual, self.right = self.usual or row["seconds"], self.right or row["right"]
        row["exact_seconds"] = self.usual
        self.longest = max(self.longest, time.monotonic() - began)
        self.rows.keep(row)
        print(f"{name}: {row['seconds']:.4f} s a picture, {row['accuracy']:.1f} %, {row['psnr']:.1f} dB", flush=True)
        return {**row, "exact_right": self.right}

    def ours(self, preset: str | Config = "exact", /, **fields: Any) -> Way:
        """The pipeline accelerated by that preset: `accelerated`."""
        return accelerated(self.pipe, preset, **fields)

    def _batches(self) -> list[slice]:
        return [slice(first, first + self.batch) for first in range(0, len(self.exam.captions), self.batch)]

    def _run(self, steps: int, computed: Callable[[int], float], batch: int) -> dict[str, Any]:
        right, distances, features, seconds, evaluations = "", [], [], 0.0, []
        exact = not self.exact
        self._draw(slice(0, batch), steps)
        for first in range(0, len(self.exam.captions), batch):
            chosen = slice(first, first + batch)
            started = time.perf_counter()
            pictures = self._draw(chosen, steps)
            seconds += time.perf_counter() - started
            pixels = (pictures * 255).round().to(torch.uint8)
            if exact:
                self.exact += pixels
            distances.append(psnr(pixels.float() / 255, torch.stack(self.exact[chosen]).float() / 255))
            on_device = pictures.to(self.pipe.device)
            verdicts = map(judge, read(self.reader, on_device), self.exam.said[chosen])
            right += "".join("01"[verdict["right"]] for verdict in verdicts)
            with torch.no_grad():
                features.append(self.reader.features(on_device).double().cpu())
            evaluations.append(computed(steps))
        decibels, accuracy = torch.cat(distances), Accuracy.of(verdicts_of(right))
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

    def write(
        self, table: Sequence[Mapping[str, Any]], *, name: str, out: Path, asked: str = "", of: str = "", **more: Any
    ) -> Path:
        """The table with machine and command, and `more`; what is left is said in it.

        `asked` is what else the command was given, `of` what that adds to the file's name.
        """
        device = self.pipe.device
        place = torch.cuda.get_device_name(device).split()[-1].lower() if device.type == "cuda" else "cpu"
        file = out / f"{date.today()}-{place}-builtin-{name}{of and f'-{of}'}.json"
        about = {
            "command": f"python recipes/builtin/{name}.py --captions {len(self.exam.captions)} "
            f"--batch {self.batch} --seed {self.seed}{asked}",
            "machine": machine(), "place": place_of(self.pipe), "rows_left": self.left,
        }  # fmt: skip
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({**about, **more, "rows": list(table)}, indent=1) + "\n", encoding="utf-8")
        return file


def _computed(pipe: Any, steps: int) -> float:
    """Evaluations of the denoiser at the last call, of `steps`."""
    acceleration = acceleration_of(pipe)
    assert acceleration is not None
    (lane,) = acceleration.target.lanes.values()
    if lane.cache is None:
        return float(steps)
    count = lane.cache.tally.last
    return steps * count.computed / (count.computed + count.skipped)


def verdicts_of(right: str) -> list[bool]:
    """ "0110" -> a verdict for each caption."""
    return [one == "1" for one in right]


def beside_exact(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without its single verdicts, and with what it is beside exact of its run: speed, the paired difference."""
    exact = verdicts_of(row["exact_right"])
    paired = compare(verdicts_of(row["right"]), exact)
    return {
        **{name: value for name, value in row.items() if name not in ("right", "exact_right", "of")},
        "exact_accuracy": 100 * Accuracy.of(exact).share,
        "speedup": row["exact_seconds"] / row["seconds"],
        "difference": 100 * paired.difference,
        "difference_interval": [100 * end for end in paired.interval],
    }  # fmt: skip
