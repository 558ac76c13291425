"""Kernels against their bandwidth bound, on a GPU; the loop that survives a crash, anywhere."""

import json
from pathlib import Path

import pytest
import torch

from vivace.bench import kernels
from vivace.bench.book import Book
from vivace.bench.process import Children, Ended
from vivace.kernels import KERNELS

MACHINE = {"gpus": [{"name": "NVIDIA H200"}], "versions": {"torch": "2.11.0"}}


def test_a_crash_costs_the_case_it_came_with(tmp_path, monkeypatch):
    names = [f"{name}/{case.name}" for name, kernel in KERNELS.items() for case in kernel.bench]
    times = {"microseconds": 2.0, "bound_microseconds": 1.0, "share": 0.5, "bytes": 1, "copy_tb_per_second": 4.0}

    def some(self, arguments, *, seconds):
        """Times two cases; the third, where it is `crash`, ends the process."""
        path, *left = arguments
        done = left[: left.index(crash)] if crash in left[1:] else [] if crash == left[0] else left
        lines = [{"kernel": n.split("/")[0], "case": n.split("/", 1)[1], "status": "done", **times} for n in done]
        Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return Ended(code=0 if len(done) == len(left) else -11, said="Segmentation fault\n")

    crash = names[2]
    monkeypatch.setattr(Children, "run", some)
    kernels.bench_kernels(tmp_path, machine=MACHINE, command="vivace bench", seconds=9, on_line=lambda line: None)
    lines = Book(tmp_path).kernels()
    assert [f"{line['kernel']}/{line['case']}" for line in lines] == names
    assert [line["status"] for line in lines].count("failed") == 1
    assert (lines[2]["status"], lines[2]["why"]) == ("failed", "Segmentation fault")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="times CUDA kernels")
def test_a_kernel_takes_longer_than_its_bound():
    kernel = KERNELS["norm_modulate"]
    found = kernels.measure(kernel, kernel.bench[0], copy=kernels.copy_rate())
    assert 0.2 < found["share"] < 1.5
    assert found["microseconds"] > 0
