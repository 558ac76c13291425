"""The kernels compile for GPUs that this machine does not have, and a second resolution compiles nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vivace.kernels import KERNELS

REHEARSED = (
    "flux",
    "flux:fp8",
    "flux2",
    "sd3",
    "sd3:fp8",
    "qwen_image",
    "z_image",
    "pixart",
    "wan",
    "sd",
    "sdxl",
    "svd",
)


def run_for(script, tmp_path, *arguments):
    """The rows that a script beside this one prints, in a process without the interpreter."""
    script = Path(__file__).with_name(script)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, script, *arguments], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return [line.split("\t") for line in run.stdout.splitlines()]


@pytest.mark.parametrize("capability", [75, 90])
def test_compiles_once(capability, tmp_path):
    pytest.importorskip("triton")
    rows = run_for("compile_for.py", tmp_path, str(capability))
    assert [*dict.fromkeys(kernel for kernel, *_ in rows)] == [
        name for name, kernel in KERNELS.items() if kernel.since <= capability
    ]
    for kernel, case, first, second, launchers, widest in rows:
        assert int(first) >= 1, f"{kernel}, {case}: nothing was compiled"
        assert launchers == first, f"{kernel}, {case}: {first} kernels, and {launchers} of what launches them"
        assert int(second) == 0, f"{kernel}, {case}: another resolution compiled {second} kernels"
        assert widest == "wide", f"{kernel}, {case}: memory is not accessed 16 bytes at a time"


def test_row_kernels_take_fewer_instructions_than_their_bytes_leave_time_for(tmp_path):
    """At the H200's clock and bandwidth a multiprocessor has 38 issue slots for the 6 bytes of an element."""
    pytest.importorskip("triton")
    rows = run_for("slots_for.py", tmp_path, "90", "residual_norm", "glu")
    assert len(rows) == len(KERNELS["residual_norm"].bench) + len(KERNELS["glu"].bench)
    for kernel, case, slots, slow, registers in rows:
        assert 5 < float(slots) < 38, f"{kernel}, {case}: {slots} slots an element"
        assert float(slow) < 3, f"{kernel}, {case}: {slow} slow instructions an element"
        assert int(registers) < 160, f"{kernel}, {case}: {registers} registers"


def test_a_rehearsal_meets_every_kernel_that_any_size_needs(tmp_path):
    pytest.importorskip("triton")
    for family, rehearsed, more in run_for("rehearse_for.py", tmp_path, "90", *REHEARSED):
        assert int(rehearsed) >= 4, f"{family}: only {rehearsed} kernels"
        assert int(more) == 0, f"{family}: other resolutions and batches compile {more} kernels more"
