"""How much of an output that a cache leaves out can be foretold, on the built-in model.

    python recipes/builtin/foretold.py --captions 32 -o FILE

Along exact runs, every other step is held to be left out, and its guided output estimated by the best linear form that
half of the captions give, from what a cache may know: the last computed outputs, the noise the run began with, and,
for what probes the model, how the stream after its first blocks differs from what it was at the step before. What is
printed is each step's relative error on the other half of the captions, beside that of the last computed output as it
is. What none of them foretells is new at that step, and only computing it gives it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import vivace
from vivace.evals.builtin import draw_exam
from vivace.evals.sample import draw
from vivace.machine import machine
from vivace.scheduler import use_scheduler

STEPS, GUIDANCE = 28, 3.0
NODES = (1, 2, 3, 6)  # last computed outputs
BLOCKS = (1, 2, 4)  # of seven, after which the stream is looked at
RIDGE = 1e-8


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--captions", type=int, default=32)
    asked.add_argument("--batch", type=int, default=8)
    asked.add_argument("--solver", default="dpmsolvermultistep")
    asked.add_argument("--seed", type=int, default=7)
    asked.add_argument("-o", "--out", type=Path, required=True)
    given = asked.parse_args()
    seen = observed(given.captions, batch=given.batch, solver=given.solver, seed=given.seed)
    table = {str(step): errors(seen, step) for step in range(1, STEPS - 1, 2)}
    about = {
        "command": f"python recipes/builtin/foretold.py --captions {given.captions} --solver {given.solver} "
        f"--seed {given.seed}",
        "machine": machine(),
    }  # fmt: skip
    given.out.write_text(json.dumps({**about, "relative_error": table}, indent=1) + "\n", encoding="utf-8")
    for step, row in table.items():
        print(f"step {step}: " + ", ".join(f"{name} {value:.3f}" for name, value in row.items()))
    print(given.out)


def observed(captions: int, *, batch: int, solver: str, seed: int) -> dict[str, torch.Tensor]:
    """Of exact runs: the guided `outputs` and the `noise`, and the transformer's `halves` with its `stream <k>`.

    `outputs` `[N, steps, T, C]`, `noise` `[N, T, C]`, the others `[2, N, steps, T, ...]`, unconditional first.
    """
    pipe = vivace.load("builtin")
    pipe.set_progress_bar_config(disable=True)
    use_scheduler(pipe, solver, prediction="flow")
    model = pipe.transformer
    runs: dict[str, list[list[torch.Tensor]]] = {"halves": [], **{f"stream {k}": [] for k in BLOCKS}}

    def keep(name: str, tensor: torch.Tensor) -> None:
        runs[name][-1].append(tensor.detach().float())

    for k in BLOCKS:
        model.transformer_blocks[k - 1].register_forward_hook(lambda _m, _a, out, k=k: keep(f"stream {k}", out[1]))
    model.proj_out.register_forward_hook(lambda _m, _a, out: keep("halves", out))
    noise: list[torch.Tensor] = []
    model.pos_embed.register_forward_pre_hook(
        lambda _m, args: noise.append(args[0].detach().float()) if len(runs["halves"][-1]) == 0 else None
    )
    said = draw_exam(captions, seed=seed).captions
    for first in range(0, captions, batch):
        for rows in runs.values():
            rows.append([])
        chosen = said[first : first + batch]
        seeds = [seed + first + i for i in range(len(chosen))]
        with torch.no_grad():
            draw(pipe, chosen, steps=STEPS, seeds=seeds, output_type="latent", guidance_scale=GUIDANCE)
    found = {
        name: torch.cat([torch.stack(run, 1).unflatten(0, (2, -1)) for run in kept], 1) for name, kept in runs.items()
    }
    unconditional, conditional = found["halves"]
    found["outputs"] = unconditional + GUIDANCE * (conditional - unconditional)
    start = torch.cat([one.chunk(2)[0] for one in noise])
    patch = model.config.patch_size
    # The order of an output's channels: row and column within the patch, then the latent's channel.
    patches = start.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))
    found["noise"] = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    return found


def errors(seen: Mapping[str, torch.Tensor], step: int) -> dict[str, float]:
    """Relative errors on the second half of the captions of estimates that the first half gives."""
    outputs, noise = seen["outputs"], seen["noise"]
    computed = range(0, step, 2)
    wanted = outputs[:, step]
    found = {"the last output": _size(wanted - outputs[:, step - 1], wanted)}
    for count in NODES:
        nodes = [outputs[:, node] for node in computed][-count:]
        if len(nodes) == count:
            found[f"of {count}"] = _fitted(nodes, wanted)
            found[f"of {count} and the noise"] = _fitted([*nodes, noise], wanted)
    halves = seen["halves"]
    for k in BLOCKS:
        stream = seen[f"stream {k}"]
        change = _mapped(stream[:, :, step] - stream[:, :, step - 1], halves[:, :, step] - halves[:, :, step - 1])
        unconditional, conditional = halves[:, :, step - 1] + change
        guess = unconditional + GUIDANCE * (conditional - unconditional)
        found[f"of the stream after {k}"] = _size(wanted - guess, wanted)
    return found


def _size(error: torch.Tensor, of: torch.Tensor) -> float:
    """Of the second half of the captions."""
    half = len(error) // 2
    return (error[half:].norm() / of[half:].norm()).item()


def _fitted(nodes: Sequence[torch.Tensor], wanted: torch.Tensor) -> float:
    """By one weight a node, fitted to the first half."""
    half = len(wanted) // 2
    basis = torch.stack(nodes, -1).double()
    weights = _solved(basis[:half].flatten(0, -2), wanted[:half].double().flatten()[:, None], ridge=RIDGE)
    return _size(wanted.double() - (basis @ weights)[..., 0], wanted)


def _mapped(change: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """What one matrix for all tokens, fitted to the first half, makes of a stream's change."""
    half = change.shape[1] // 2
    rows = change[:, :half].flatten(0, -2).double(), wanted[:, :half].flatten(0, -2).double()
    return (change.double() @ _solved(*rows, ridge=1e-2)).float()


def _solved(rows: torch.Tensor, wanted: torch.Tensor, *, ridge: float) -> Any:
    products = rows.T @ rows
    products += ridge * products.diagonal().mean() * torch.eye(len(products), dtype=products.dtype)
    return torch.linalg.solve(products, rows.T @ wanted)


if __name__ == "__main__":
    main()
