"""The kernels compile for GPUs that this machine does not have, and a second resolution compiles nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vivace.kernels import KERNELS

SCRIPT = Path(__file__).with_name("compile_for.py")


def compile_for(capability, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, SCRIPT, str(capability)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return [line.split("\t") for line in run.stdout.splitlines()]


@pytest.mark.parametrize("capability", [75, 90])
def test_compiles_once(capability, tmp_path):
    pytest.importorskip("triton")
    rows = compile_for(capability, tmp_path)
    assert [kernel for kernel, *_ in rows] == [name for name, kernel in KERNELS.items() if kernel.since <= capability]
    for kernel, case, first, second, widest in rows:
        assert int(first) >= 1, f"{kernel}, {case}: nothing was compiled"
        assert int(second) == 0, f"{kernel}, {case}: another resolution compiled {second} kernels"
        assert widest == "v4", f"{kernel}, {case}: memory is not accessed 16 bytes at a time"
