"""`vivace doctor`: what it says on this machine, and that a thing which does not work is said not to."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from vivace import doctor
from vivace.attention import BACKENDS
from vivace.doctor import Check, Diagnosis
from vivace.kernels import KERNELS


@pytest.fixture(scope="module")
def report():
    ended = subprocess.run([sys.executable, "-m", "vivace", "doctor", "--json"], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("\n") == 1
    return json.loads(ended.stdout)


def of(report, group):
    return {check["name"]: check for check in report["checks"] if check["group"].startswith(group)}


def test_machine(report):
    facts = report["machine"]
    assert facts["versions"]["torch"] == torch.__version__
    assert len(facts["gpus"]) == torch.cuda.device_count()
    assert facts["cores"] >= 1
    assert facts["memory_bytes"] > 2**28


def test_dtypes_and_attention(report):
    dtypes, attention = of(report, "dtypes"), of(report, "attention")
    assert dtypes["fp32 matmul"]["works"]
    assert dtypes["bf16 matmul"]["works"]
    assert len(dtypes) == 6
    assert attention["SDPA math, bf16"]["works"]
    assert {f'attention="{name}"' for name in BACKENDS} <= set(attention)
    assert attention['attention="native"']["works"], attention
    if not torch.cuda.is_available():
        assert "GPUs only" in attention["SDPA cudnn, bf16"]["detail"]


def test_every_kernel_is_tried(report):
    tried = of(report, "triton")
    assert set(tried) == {"a tiny kernel", *KERNELS}
    assert all(check["works"] for check in tried.values()), tried


def test_what_is_missing_says_what_to_install(report):
    for check in of(report, "packages").values():
        assert check["works"] or check["detail"].startswith("pip install -c constraints.txt ")


def test_a_wrong_result_does_not_pass():
    check = doctor._tried("dtypes", "wrong", lambda: doctor._close(torch.ones(4), torch.zeros(4) + 2, within=0.1))
    assert not check.works
    assert "relative error 0.5, allowed 0.1" in check.detail
    assert not doctor._tried("", "", lambda: doctor._close(torch.full((4,), torch.nan), torch.ones(4), within=1)).works


def test_a_package_that_does_not_import(monkeypatch):
    package = dataclasses.replace(doctor.PACKAGES[0], distribution="rich", module="rich.nothing")
    monkeypatch.setattr(doctor, "PACKAGES", (package,))
    (check,) = doctor._packages()
    assert not check.works
    assert "rich.nothing" in check.detail


def test_table():
    facts = doctor.machine()
    checks = (Check(group="dtypes", name="fp0", works=False, detail="[none] such"),)
    console = Console(width=100, record=True, file=sys.stderr)
    console.print(Diagnosis(machine=facts, checks=checks))
    text = console.export_text()
    assert torch.__version__ in text
    assert "[none] such" in text
