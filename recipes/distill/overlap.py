"""How many captions of an exam stand word for word among those that a training on the built-in model's world drew.

    python recipes/distill/overlap.py builtin -o benchmarks/<date>-<machine>-distill-overlap.json

The captions are drawn again as the training of that config draws them, in as many batches as its cache has
(`vivace distill builtin --precache scenes --batches 160`); nothing is rendered. A GPU's generator draws other scenes
than the CPU's: the very captions of a training on a GPU are found on one (`--device cuda`). `examine.py --unseen`
leaves them out of its exam.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vivace.distill import DistillConfig, read_config
from vivace.distill.data.world import World
from vivace.evals.builtin import Exam, draw_exam
from vivace.machine import machine

CACHED = 160  # batches of the ready config's cache


def trained(config: DistillConfig, *, batches: int, device: str) -> set[str]:
    """The captions of a training's first batches."""
    drawn = World(batch=config.batch, seed=config.seed, side=config.size[0], device=device)
    return {caption for _ in range(batches) for caption in drawn.draw()[1]}


@dataclass(frozen=True)
class Overlap:
    """An exam, which of its captions a training drew too, and how many different ones that drew."""

    exam: Exam
    seen: tuple[bool, ...]
    different: int

    @classmethod
    def of(cls, exam: Exam, trained: set[str]) -> Overlap:
        return cls(exam, tuple(caption in trained for caption in exam.captions), len(trained))

    def rest(self) -> Exam:
        """The exam without what the training drew."""
        kept = [place for place, seen in enumerate(self.seen) if not seen]
        captions, said = (tuple(of[place] for place in kept) for of in (self.exam.captions, self.exam.said))
        return dataclasses.replace(self.exam, scenes=self.exam.scenes[torch.tensor(kept)], captions=captions, said=said)

    def to_dict(self) -> dict[str, Any]:
        """Counts, in all and by number of objects, for JSON."""
        rows = {}
        for name in ("all", *dict.fromkeys(self.exam.counts)):
            own = [seen for seen, count in zip(self.seen, self.exam.counts, strict=True) if name in ("all", count)]
            rows[name] = {"captions": len(own), "trained on": sum(own), "share": sum(own) / len(own)}
        return {"different captions of the training": self.different, "exam": rows}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="of vivace distill, with data of kind builtin")
    parser.add_argument("--batches", type=int, default=CACHED)
    parser.add_argument("--captions", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0, help="of the exam")
    parser.add_argument("--device", default="cpu", help="whose generator draws the training's scenes")
    parser.add_argument("-o", "--output", type=Path)
    asked = parser.parse_args(arguments)
    config = read_config(asked.config)
    seen = trained(config, batches=asked.batches, device=asked.device)
    found = Overlap.of(draw_exam(asked.captions, seed=asked.seed), seen).to_dict()
    about = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(gpus=asked.device != "cpu"),
        "training": {"batches": asked.batches, "of each": config.batch, "seed": config.seed, "device": asked.device},
        "exam's seed": asked.seed,
    }
    for name, row in found["exam"].items():
        print(f"{name}: {row['trained on']} of {row['captions']} captions, {100 * row['share']:.2f} %")
    if asked.output:
        asked.output.write_text(json.dumps({**about, **found}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
