"""Training steps at true size on random weights: what a batch of every stage takes, with and without the fast lane.

    python recipes/distill/true_size.py sdxl -o benchmarks/<date>-<gpu>-distill-sdxl.json
    python recipes/distill/true_size.py sd3 -o benchmarks/<date>-<gpu>-distill-sd3.json

Nothing is downloaded: the denoiser, VAE and text encoders have the published shapes and random weights, the pictures
are the built-in model's world at the config's size. SD3 runs without T5. `--set student.compile=true` compiles the
student on both sides. `--tiny` tries the script itself anywhere.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch

import vivace
from vivace.distill import Data, DistillConfig, Records, read_config
from vivace.distill.plan import Plan, make_plan
from vivace.families import FAMILIES
from vivace.families.tokenizers import clip_tokenizer
from vivace.machine import machine


def pipeline(name: str, *, device: str) -> Any:
    """A pipeline at true size with random weights: SDXL, or SD3.5-medium with its two CLIPs."""
    import diffusers

    family = FAMILIES[name]
    encoders = {
        slot: family.full(component=slot, device=device) for slot in family.text_encoders if slot != "text_encoder_3"
    }
    parts: dict[str, Any] = {**encoders, "vae": family.full(component="vae", device=device)}
    parts |= {slot.replace("text_encoder", "tokenizer"): clip_tokenizer() for slot in encoders}
    parts[family.denoisers[0]] = family.full(device=device)
    if name == "sd3":
        parts |= {"text_encoder_3": None, "tokenizer_3": None}
        parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    else:
        kind, facts = family.scheduler
        parts["scheduler"] = getattr(diffusers, kind)(**facts)
    return getattr(diffusers, family.pipelines[0])(**parts)


def measured(config: DistillConfig, pipe: Any, *, repeats: int) -> Plan:
    """A plan, with a peak of its own."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return make_plan(config, pipe=pipe, repeats=repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("sdxl", "sd3"))
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--set", dest="assignments", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--presets", nargs="+", default=["exact", "fast"], help="of the teacher, beside stock")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()
    config = read_config(asked.model, assignments=asked.assignments)
    config = dataclasses.replace(config, data=Data(kind="builtin"), records=Records(trackers=()))
    if asked.tiny:
        config = dataclasses.replace(config, size=(64, 64))
        pipe = FAMILIES[asked.model].tiny()
    else:
        pipe = pipeline(asked.model, device="cuda")
    plans: dict[str, Plan] = {}
    report = {"command": " ".join(["python", *sys.argv]), "machine": machine(), "config": config.to_dict()}
    for preset in (None, *asked.presets):
        vivace.restore(pipe)
        name = preset or "stock"
        plans[name] = measured(dataclasses.replace(config, accelerate=preset), pipe, repeats=asked.repeats)
        report[name] = {**plans[name].to_dict(), "times as fast, by stage": faster(plans["stock"], plans[name])}
        if asked.output:
            asked.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        for number, (stage, factor) in enumerate(
            zip(plans[name].stages, faster(plans["stock"], plans[name]), strict=True)
        ):
            print(f"{name}, stage {number + 1}: {stage.seconds:.3f} s a batch, {stage.pictures_per_second:.2f} "
                  f"pictures/s, rollout {stage.rollout:.0%}, {factor:.2f} times stock's speed", flush=True)  # fmt: skip


def faster(stock: Plan, plan: Plan) -> list[float]:
    """How many times as fast a batch of each stage is."""
    return [one.seconds / other.seconds for one, other in zip(stock.stages, plan.stages, strict=True)]


if __name__ == "__main__":
    main()
