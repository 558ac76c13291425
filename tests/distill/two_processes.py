"""Trains in the processes that torchrun starts; each writes what it holds at the end. Run by test_trainer."""

import dataclasses
import json
import sys
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from vivace.distill import Critic, Data, DistillConfig, Optimizer, Records, Stage, Student
from vivace.distill.plan import memory
from vivace.distill.precache import write_cache
from vivace.distill.trainer import make_accelerator, make_training, train
from vivace.families import FAMILIES

PLAIN = (Stage(batches=8, steps=4, guidance=(2.0, 3.0)),)
SIMULATED = (Stage(batches=8, steps=4, guidance=(2.0, 3.0), simulated=0.5),)


def config(output: Path, parallel: str) -> DistillConfig:
    """Four small batches with every loss."""
    return DistillConfig(
        output=str(output),
        stages=(Stage(batches=4, steps=4, guidance=(2.0, 3.0), matching=0.5, adversarial=0.3),),
        size=(64, 64),
        data=Data(kind="builtin"),
        student=Student(rank=4, ema=0.9),
        critic=Critic(rank=2, lr=1e-3),
        optimizer=Optimizer(lr=1e-3, accumulate=2),
        records=Records(trackers=(), sample_every=2, save_every=2, prompts=("a red ring",), steps=(2,)),
        batch=1,
        accelerate=None,
        parallel=parallel,  # type: ignore[arg-type]
    )


def main(output: Path) -> None:
    torch.set_num_threads(1)
    accelerator = make_accelerator(config(output, "ddp"), output)
    for parallel in ("ddp", "fsdp"):
        chosen = config(output / "run", parallel)
        first, second = (make_training(chosen, accelerator, pipe=FAMILIES["sd3"].tiny()) for _ in range(2))
        sharded = any(hasattr(parameter, "full_tensor") for parameter in first.plain.parameters())
        assert sharded == (parallel == "fsdp")
        (output / f"{parallel}-memory-{accelerator.process_index}").write_text(json.dumps(memory(first)))
        for _ in range(2):
            first.batch()
        second.load(first.tensors(), done=2)
        second.supply.load(first.supply.state())
        for training, name in ((first, "straight"), (second, "resumed")):
            for _ in range(2):
                training.batch()
            tensors = training.tensors()
            held = {f"{part}.{key}": value.contiguous() for part, own in tensors.items() for key, value in own.items()}
            save_file(held, output / f"{parallel}-{name}-{accelerator.process_index}")
    # Processes that chose for themselves would gather shards at different times.
    for fields in ({"method": "consistency", "timesteps": "uniform"}, {"stages": SIMULATED}):
        own = dataclasses.replace(config(output / "run", "fsdp"), critic=None, **{"stages": PLAIN, **fields})
        training = make_training(own, accelerator, pipe=FAMILIES["sd3"].tiny())
        for _ in range(8):
            training.batch()
    # and the whole of it, sharded, with checkpoints, grids and result
    train(config(output / "run", "fsdp"), pipe=FAMILIES["sd3"].tiny())
    # and on batches that the processes wrote beforehand, in turns
    write_cache(config(output / "run", "ddp"), output / "cache", batches=3, pipe=FAMILIES["sd3"].tiny())
    data = Data(kind="cached", path=str(output / "cache"))
    cached = dataclasses.replace(config(output / "from-cache", "ddp"), data=data)
    train(cached, pipe=FAMILIES["sd3"].tiny())
    # and on pictures of which half have no caption
    (output / "pictures").mkdir(exist_ok=True)
    for number in range(8) if accelerator.is_main_process else ():
        Image.new("RGB", (64, 64), (30 * number, 0, 0)).save(output / "pictures" / f"{number}.png")
        if number % 2:
            (output / "pictures" / f"{number}.txt").write_text("red")
    accelerator.wait_for_everyone()
    data = Data(kind="folder", path=str(output / "pictures"))
    result = train(
        dataclasses.replace(cached, output=str(output / "halved"), stages=PLAIN, critic=None, data=data),
        pipe=FAMILIES["sd3"].tiny(),
    )
    (output / f"skipped-{accelerator.process_index}").write_text(json.dumps(dict(result.skipped)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
