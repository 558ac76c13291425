"""What each part of the method is worth on the built-in model: the same budget without it, then one exam of all.

    python recipes/distill/ablate.py --share 0.3 --output runs/ablate
    python recipes/distill/examine.py runs/ablate/*/result --steps 4 -o benchmarks/<date>-<gpu>-distill-ablation.json

`--share` shortens every stage to that part of the ready config's batches, and with it what lasts for some of them: the
rise and fall of the learning rates and the memory of the running mean.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from vivace.distill import DistillConfig, Stage, read_config, train


def shortened(config: DistillConfig, share: float) -> DistillConfig:
    """The same training in that part of its batches."""
    stages = tuple(replace(stage, batches=max(1, round(share * stage.batches))) for stage in config.stages)
    warmup, decay = (round(share * batches) for batches in (config.optimizer.warmup, config.optimizer.decay))
    ema = config.student.ema
    return replace(
        config,
        stages=stages,
        optimizer=replace(config.optimizer, warmup=warmup, decay=decay),
        student=replace(config.student, ema=ema and ema ** (1 / share)),
    )


def of_stages(**fields: float) -> Callable[[DistillConfig], DistillConfig]:
    """Every stage with these fields; one left with at most the adversary, which alone diverges, has the distance."""

    def changed(config: DistillConfig) -> DistillConfig:
        stages = [replace(stage, **fields) for stage in config.stages]
        idle = [not (stage.distillation or stage.matching) for stage in stages]
        stages = [replace(stage, distillation=1.0) if one else stage for one, stage in zip(idle, stages, strict=True)]
        critic = config.critic if any(stage.matching for stage in stages) else None
        return replace(config, stages=tuple(stages), critic=critic)

    return changed


def one_stage(config: DistillConfig) -> DistillConfig:
    """The last stage for all batches."""
    return replace(config, stages=(replace(config.stages[-1], batches=config.batches),))


def consistency(config: DistillConfig) -> DistillConfig:
    """LCM's way: one solver step, uniform times, no other loss, and a rate at which it does not run after itself."""
    stage = Stage(batches=config.batches, steps=32, guidance=config.stages[0].guidance)
    own = {"method": "consistency", "timesteps": "uniform", "distance": "huber", "critic": None}
    return replace(config, stages=(stage,), optimizer=replace(config.optimizer, lr=2e-4), **own)


VARIANTS: dict[str, Callable[[DistillConfig], DistillConfig]] = {
    "all": lambda config: config,
    "without-distillation": lambda config: replace(
        config,
        # A stage has to weigh something: the first one, which has no other loss, goes.
        stages=tuple(replace(stage, distillation=0.0) for stage in config.stages if stage.matching),
    ),
    "without-matching": of_stages(matching=0.0),
    "without-critic": lambda config: replace(config, critic=None),
    "without-adversary": of_stages(adversarial=0.0),
    "distillation-only": of_stages(matching=0.0, adversarial=0.0),
    "uniform-times": lambda config: replace(config, timesteps="uniform"),
    "one-stage": one_stage,
    "l2": lambda config: replace(config, distance="l2"),
    "features": lambda config: replace(config, distance="features"),
    "consistency": consistency,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="builtin")
    parser.add_argument("--set", dest="assignments", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--output", type=Path, default=Path("runs/ablate"))
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    asked = parser.parse_args()
    config = shortened(read_config(asked.config, assignments=asked.assignments), asked.share)
    for name in asked.only:
        chosen = VARIANTS[name](replace(config, output=str(asked.output / name)))
        result = train(chosen)
        print(f"{name}: {result.done} batches, {dict(result.losses)}", flush=True)


if __name__ == "__main__":
    main()
