"""What nvidia-smi prints, read; a CPU draws nothing that it could say."""

import os
import time
from types import SimpleNamespace

import torch

from vivace.bench.power import summary, watched

PRINTED = """1980, 412.55, Not Active
1500, 691.31, Active
1485, 690.55, Active
[N/A], 690.55, Active
1515, 69"""


def test_medians_of_what_can_be_read():
    assert summary(PRINTED) == {"clock_mhz": 1500, "watts": 690.55, "capped": 0.667}
    assert summary("No devices were found\n") == {}


def test_a_cpu_has_none():
    with watched(torch.device("cpu")) as drawn:
        pass
    assert drawn == {}


def test_a_program_that_prints_for_ever_is_read_and_ended(tmp_path, monkeypatch):
    program, printed = tmp_path / "nvidia-smi", tmp_path / "printed"
    program.write_text(f"#!/bin/sh\necho 1500, 690.0, Active\ntouch {printed}\nexec sleep 600\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="0"))
    with watched(torch.device("cuda")) as drawn:
        while not printed.exists():
            time.sleep(0.01)
    assert drawn == {"clock_mhz": 1500, "watts": 690, "capped": 1.0}
