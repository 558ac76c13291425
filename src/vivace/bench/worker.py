"""One contestant, alone in its process: `python -m vivace.bench.worker TASK.json RESULT.json`.

A task is a workload, a contestant, and where the reference's output lies. What goes wrong is a result too; only a crash
or a kill leaves no result file.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vivace.bench.contestant import PEERS, REFERENCE, Contestant, prepare
from vivace.bench.workload import Workload, from_dict
from vivace.errors import InputError, first_line


def main(task_path: str, result_path: str) -> None:
    """Reads the task, runs the contestant, writes the result."""
    task = json.loads(Path(task_path).read_text())
    contestant = Contestant(**{**task["contestant"], "fields": tuple(task["contestant"]["fields"])})
    reference = Path(task["reference"])
    trace = Path(task["trace"]) if task["trace"] else None
    try:
        result = run(from_dict(task["workload"]), contestant, reference=reference, trace=trace)
    except InputError as error:
        result = {"status": "not offered", "why": str(error)}
    except Exception as error:  # a contestant that breaks is a row of the table
        traceback.print_exc()
        result = {"status": "failed", "why": f"{type(error).__name__}: {first_line(error)}"}
    # Whole or not at all: the parent may end this process at any moment.
    written = Path(f"{result_path}.part")
    written.write_text(json.dumps(result, default=str))
    written.replace(result_path)


def run(workload: Workload, contestant: Contestant, *, reference: Path, trace: Path | None = None) -> dict[str, Any]:
    """Times one contestant; the REFERENCE instead writes its output to `reference`, from which errors are measured."""
    import torch

    from vivace.bench.clock import WARM_UP, samples, summary, synchronize, wall
    from vivace.bench.flops import tflop
    from vivace.bench.parts import parts_of
    from vivace.bench.power import watched
    from vivace.bench.subject import build, call_of

    device = torch.device(workload.device)
    subject = build(workload)
    synchronize(device)
    weights = _allocated(device)
    _reset_peak(device)
    started = time.perf_counter()
    detail = prepare(contestant, subject, workload)
    synchronize(device)
    prepared = time.perf_counter() - started
    with torch.no_grad(), _scope(contestant, workload):
        call = call_of(subject, workload)
        first, output = wall(call, device)
        if contestant.name == REFERENCE:
            _save(output, reference)
            return {"status": "done", "detail": detail, "seconds": round(prepared + first, 2)}
        error = _error(output, reference)
        del output
        early = [round(wall(call, device)[0], 4) for _ in range(1 if workload.end_to_end else WARM_UP)]
        with watched(device) as drawn:
            times = samples(call, device, fewest=3 if workload.end_to_end else 7)
        peak, last = _peak(device), _error(call(), reference)
        profile = _profile(call, trace) if trace else None
        parts = parts_of(call, subject) if workload.end_to_end else None
        quiz = _quiz(subject, workload, contestant.quiz) if contestant.quiz else None
    report = _report(contestant, subject)
    return {
        "status": "done",
        "detail": detail,
        **summary(times),
        **({"power": drawn} if drawn else {}),
        "cold_seconds": round(prepared + first, 3),
        "prepare_seconds": round(prepared, 3),
        "early_seconds": early,
        "weight_bytes": weights,
        "peak_bytes": peak,
        "reserved_bytes": torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None,
        "rate": _rate(contestant, report),
        "tflop": None if workload.end_to_end else float(f"{tflop(workload):.6g}"),
        "error": last,
        "first_error": error,
        "report": report,
        **({"parts": parts} if parts else {}),
        **({"profile": profile} if profile else {}),
        **({"quiz": quiz} if quiz else {}),
    }


def _scope(contestant: Contestant, workload: Workload) -> Any:
    """A bare forward of ours runs within one request, as in a pipeline: what holds for a prompt is computed once.

    The request has as many steps as the model usually takes, or one more: the forward's, at 500, is in their middle.
    """
    if not contestant.ours or workload.end_to_end:
        return nullcontext()
    import torch

    from vivace.request import open_request

    return open_request(scheduler=SimpleNamespace(timesteps=torch.linspace(1000, 0, workload.steps | 1)))


def _report(contestant: Contestant, subject: Any) -> dict[str, Any] | None:
    if not contestant.ours:
        return None
    from vivace.quant.layers import condensed
    from vivace.report import report

    told = report(subject)
    # A line a kind of layer: there are hundreds of each.
    return {**told.to_dict(), "layers": {name: condensed(layers) for name, layers in told.layers.items()}}


def _rate(contestant: Contestant, report: Mapping[str, Any] | None) -> str | None:
    """The roofline that the time is held against: that of the 8-bit format its linears run in, or None."""
    if report is None:
        return None if contestant.rung else PEERS[contestant.name].rate
    quantised = next((note["detail"] for note in report["passes"] if note["name"] == "quant" and note["done"]), "")
    return next((kind for kind in ("fp8", "int8") if quantised.startswith(f"{kind}:")), None)


def _quiz(pipe: Any, workload: Workload, count: int) -> dict[str, int]:
    """How many captions of the built-in model's exam its pictures show right; every contestant has the same ones."""
    from vivace.builtin.reader import load_reader
    from vivace.evals.builtin import draw_exam, take

    reader = load_reader(device=workload.device)
    answers = take(draw_exam(count), pipe, reader, steps=workload.steps, guidance_scale=workload.guidance)
    return {"right": sum(verdict["right"] for verdict in answers.verdicts), "total": count}


def _tensors(output: Any) -> list[Any]:
    """The floating-point tensors of an output, in fp32 on the host."""
    import torch
    from torch.utils._pytree import tree_leaves

    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
    return [leaf.detach().float().cpu() for leaf in leaves if leaf.is_floating_point()]


def _save(output: Any, path: Path) -> None:
    from safetensors.torch import save_file

    save_file({str(index): tensor.contiguous() for index, tensor in enumerate(_tensors(output))}, path)


def _error(output: Any, path: Path) -> float | None:
    """||output - reference|| / ||reference|| over all tensors of the output; None without a reference."""
    if not path.is_file():
        return None
    from safetensors.torch import load_file

    exact = load_file(path)
    ours = _tensors(output)
    squares = sum((tensor - exact[str(index)]).double().square().sum().item() for index, tensor in enumerate(ours))
    return (squares / sum(tensor.double().square().sum().item() for tensor in exact.values())) ** 0.5


def _allocated(device: Any) -> int | None:
    import torch

    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def _reset_peak(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: Any) -> int:
    """The most memory that was held at once since `_reset_peak`; on a CPU, by the process since it began."""
    import resource

    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _profile(call: Callable[[], Any], trace: Path) -> list[dict[str, Any]]:
    from vivace.bench.trace import profile

    return profile(call, trace)


if __name__ == "__main__":
    main(*sys.argv[1:])
