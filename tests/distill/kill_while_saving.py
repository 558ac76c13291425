"""Trains in child processes until twenty were killed in the middle of a save, then to the end. Run by test_trainer.

A process of its own, with one thread, so that it can be forked when everything is imported.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from vivace.distill import Data, DistillConfig, Optimizer, Records, Stage, Student, train
from vivace.families import FAMILIES

BATCHES = 60
KILLS = 20


def config(output: Path, *, batches: int = BATCHES) -> DistillConfig:
    """Sixty small batches with a checkpoint after each."""
    return DistillConfig(
        output=str(output),
        stages=(Stage(batches=batches, steps=4, guidance=(2.0, 3.0), modes=(0, 0, 0, 1.0)),),
        size=(64, 64),
        data=Data(kind="builtin"),
        student=Student(rank=4, ema=0.9),
        optimizer=Optimizer(lr=1e-3),
        records=Records(trackers=(), sample_every=0, save_every=1),
        batch=1,
        accelerate=None,
    )


def forked(output: Path) -> int:
    """A child that trains to the end, or to its end."""
    child = os.fork()
    if child == 0:
        train(config(output), pipe=FAMILIES["sd3"].tiny())
        os._exit(0)
    return child


def main(output: Path) -> None:
    torch.set_num_threads(1)
    rng = random.Random(0)
    train(config(output.with_name("warm"), batches=1), pipe=FAMILIES["sd3"].tiny())
    interrupted = 0
    while interrupted < KILLS:
        child = forked(output)
        # at its first or second save
        saves: set[str] = set()
        wanted = rng.randint(1, 2)
        while len(saves) < wanted and os.waitpid(child, os.WNOHANG) == (0, 0):
            saves |= {path.name for path in output.glob(".step-*")}
            time.sleep(0.0002)
        if len(saves) < wanted:
            break  # it came to its end
        time.sleep(rng.random() ** 4 * 0.02)  # mostly while it still goes on, sometimes after
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        interrupted += bool(list(output.glob(".step-*")))
    assert os.waitpid(forked(output), 0)[1] == 0
    sys.stdout.write(f"{interrupted}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
