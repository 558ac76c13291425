"""LoRA at true size: `python -m vivace.bench.lora` writes benchmarks/<date>-<gpu>-lora.json, a row as
soon as it is there; run again it goes on.

FLUX.1-dev with random weights, LoRA of rank 64 on all linears of its blocks, from files. Predicted on an H200 before
the first run: a merged swap 0.9 s (file 0.3, PEFT's layers 0.4, sums 0.2), a swap between loaded adapters beside the
linears 0.05 s; of a bf16 step 7 % for products beside the linears (10 ms of traffic in 155), which took 21, and since
they are within the linears' own 5.6 % (6.9 ms in 123).
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vivace.accelerate import accelerate, restore
from vivace.bench.clock import samples
from vivace.bench.results import code, record, rows_of
from vivace.bench.trace import profile
from vivace.errors import InputError
from vivace.families import FAMILIES
from vivace.machine import machine

logger = logging.getLogger(__name__)

COMMAND = "python -m vivace.bench.lora"
RANK = 64
SWAPS = 10
LAUNCHES = 5
MODES = ("merged", "side")
PEER = "diffusers hotswap and compile"
KERNELS = 12  # the costliest, of a step with adapters


def pipeline(device: str, *, tiny: bool) -> Any:
    """A FLUX pipeline with nothing but its denoiser."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    family = FAMILIES["flux"]
    transformer: Any = family.tiny().transformer.to(device) if tiny else family.full("dev", device=device)
    absent = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    make: Any = FluxPipeline
    return make(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), **dict.fromkeys(absent))


def write_file(transformer: torch.nn.Module, path: Path, *, seed: int) -> int:
    """A LoRA of `RANK` on every linear of the blocks, in the model's type, drawn on its device; returns its bytes."""
    device = next(transformer.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    factors: dict[str, torch.Tensor] = {}
    for name, linear in transformer.named_modules():
        if isinstance(linear, torch.nn.Linear) and "blocks" in name:
            for which, shape in {"A": (RANK, linear.in_features), "B": (linear.out_features, RANK)}.items():
                drawn = torch.randn(shape, generator=generator, device=device) * 0.01
                factors[f"transformer.{name}.lora_{which}.weight"] = drawn.to("cpu", linear.weight.dtype)
    save_file(factors, path)
    return path.stat().st_size


class Bench:
    """One pipeline, its inputs and its two files."""

    def __init__(self, folder: Path, *, tiny: bool = False) -> None:
        self.folder = folder
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.pipe = pipeline(self.device, tiny=tiny)
        self.files = [folder / f"{seed}.safetensors" for seed in range(2)]
        self.file_bytes = [write_file(self.pipe.transformer, path, seed=seed) for seed, path in enumerate(self.files)]
        size = (64, 64) if tiny else (1024, 1024)
        self.inputs = FAMILIES["flux"].inputs(self.pipe.transformer, size=size, text_tokens=16 if tiny else 512)

    @torch.no_grad()
    def call(self) -> torch.Tensor:
        return self.pipe.transformer(**self.inputs)[0]

    def step(self) -> float:
        """Seconds of one denoiser call among others: the median of some seconds of them.

        On a GPU some seconds before count for nothing: its first calls after a pause are slower by a tenth, until what
        it draws has come to rest.
        """
        device = torch.device(self.device)
        if self.device == "cuda":
            samples(self.call, device)
        return statistics.median(samples(self.call, device)) / 1e3

    def launch(self) -> float:
        """Seconds until the host has launched a call: where that is no less than the step, the host is the limit."""
        taken = []
        for _ in range(LAUNCHES):
            self._wait()
            start = time.perf_counter()
            self.call()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken)

    def seconds(self, work: Callable[[], Any]) -> float:
        self._wait()
        start = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - start

    def swap(self, index: int, **options: Any) -> None:
        """From whatever is loaded to one file, ready for the next call's result."""
        if not options.get("hotswap"):
            self.pipe.unload_lora_weights()
        self.pipe.load_lora_weights(self.files[index], adapter_name="style", **options)

    def mode(self, lora: str) -> dict[str, Any]:
        """What one of our modes costs."""
        accelerate(self.pipe, lora=lora)
        plain, launch = self.step(), self.launch()
        first = self.seconds(lambda: (self.swap(0), self.call())) - plain
        adapted, adapted_launch = self.step(), self.launch()
        kernels = profile(self.call, self.folder / f"{lora}.json.gz")[:KERNELS]
        self.pipe.unload_lora_weights()
        again = self.step()
        self.swap(0)
        swaps, memory, same = [], [], True
        fresh = self.call()
        for number in range(1, SWAPS + 1):
            swaps.append(self.seconds(lambda index=number % 2: (self.swap(index), self.call())) - adapted)
            memory.append(self._allocated())
            if number % 2 == 0:
                same &= torch.equal(self.call(), fresh)
        hot = [self.seconds(lambda i=i: (self.swap(i % 2, hotswap=True), self.call())) - adapted for i in range(1, 5)]
        strengths = [self.seconds(lambda w=w: (self.pipe.set_adapters("style", w), self.call())) for w in (0.5, 0.8)]
        self.pipe.unload_lora_weights()
        for index in range(2):
            self.pipe.load_lora_weights(self.files[index], adapter_name=f"style{index}")
        between = []
        for number in range(4):
            between.append(self.seconds(lambda n=number: (self.pipe.set_adapters(f"style{n % 2}"), self.call())))
        self.pipe.unload_lora_weights()
        restore(self.pipe)
        return {
            "step_s": plain,
            "adapted_step_s": adapted,
            "step_again_s": again,  # unloaded: what lies between this and the first is the machine's
            "cost_of_a_step": 2 * adapted / (plain + again) - 1,
            "launch_s": launch,
            "adapted_launch_s": adapted_launch,
            "adapted_kernels": kernels,
            "first_load_s": first,
            "swap_from_file_s": statistics.median(swaps),
            "hotswap_from_file_s": statistics.median(hot),  # into the layers that are there, as diffusers offers it
            "change_of_strength_s": statistics.median(strengths) - adapted,
            "swap_between_loaded_s": statistics.median(between[1:]) - adapted,
            "allocated_after_each_swap": memory,
            "same_as_fresh_load": same,
        }

    def hotswap(self) -> dict[str, Any]:
        """The peer: diffusers' hot swap of a regionally compiled model."""
        self.pipe.enable_lora_hotswap(target_rank=RANK)
        self.pipe.load_lora_weights(self.files[0], adapter_name="style")
        self.pipe.transformer.compile_repeated_blocks(fullgraph=True)
        cold = self.seconds(self.call)
        adapted = self.step()
        swaps = [self.seconds(lambda i=i: (self.swap(i % 2, hotswap=True), self.call())) - adapted for i in range(1, 5)]
        return {"cold_s": cold, "adapted_step_s": adapted, "swap_from_file_s": statistics.median(swaps)}

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _allocated(self) -> int | None:
        gc.collect()
        return torch.cuda.memory_allocated() if self.device == "cuda" else None


def run(
    *,
    tiny: bool = False,
    peer: bool = True,
    rows: dict[str, Any] | None = None,
    on_row: Callable[[Any], None] = lambda row: None,
) -> dict[str, Any]:
    """All figures, with the machine they were taken on; `rows` has those that are known, and each goes to `on_row`."""
    known = rows or {}
    result: dict[str, Any] = {
        "command": COMMAND + " --tiny" * tiny,
        "machine": machine(),
        "code": code(),
        "model": "FLUX.1-dev, random weights, 1024 x 1024" if not tiny else "tiny FLUX",
        "rank": RANK,
        "rows": known,
    }
    left = [mode for mode in (*MODES, *([PEER] if peer else [])) if mode not in known]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), tiny=tiny) if left else None
        for mode in left:
            assert bench is not None
            known[mode] = bench.hotswap() if mode == PEER else bench.mode(mode)
            on_row({**result, "file_bytes": bench.file_bytes})
    return {**result, "file_bytes": bench.file_bytes if bench else []}


def main(arguments: Sequence[str]) -> None:
    logging.basicConfig(level=logging.INFO)
    asked = argparse.ArgumentParser(prog="python -m vivace.bench.lora", description=__doc__)
    asked.add_argument("-o", "--output", type=Path, default=record("lora"), help="the JSON; what it has is kept")
    asked.add_argument("--tiny", action="store_true", help="a tiny model, to try the bench itself")
    given = asked.parse_args(arguments)
    try:
        rows = rows_of(given.output, command=COMMAND + " --tiny" * given.tiny)
    except InputError as error:
        asked.error(str(error))
    given.output.parent.mkdir(parents=True, exist_ok=True)

    def keep(result: Any) -> None:
        given.output.write_text(json.dumps(result, indent=1) + "\n", "utf-8")

    run(tiny=given.tiny, rows=rows, on_row=keep)
    logger.info("%s\n%s", given.output, given.output.read_text("utf-8"))


if __name__ == "__main__":
    main(sys.argv[1:])
