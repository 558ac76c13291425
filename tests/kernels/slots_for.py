"""`python slots_for.py CAPABILITY [KERNEL ...]`: what kernels cost a multiprocessor, counted in their machine code.

One line a bench case: kernel, case, issue slots and slow instructions (MUFU) an element of what it makes, registers.
Straight-line code alone is counted right: a loop's body counts once.
"""

import re
import subprocess
import sys
from collections import Counter
from math import prod
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
import triton
from compile_for import Absent
from triton.runtime.jit import JITFunction

from vivace.kernels import KERNELS

STRAIGHT = ("activate", "glu", "join_activate", "norm_modulate", "quant_rows", "residual_norm")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", re.MULTILINE)


def instructions(cubin):
    """How often each instruction stands in a kernel's machine code, and its registers."""
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        code = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True)
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True)
    return Counter(INSTRUCTION.findall(code.stdout)), re.findall(r"REG:(\d+)", usage.stdout + usage.stderr)[0]


def main():
    capability, *names = sys.argv[1:]
    triton.runtime.driver.set_active(Absent(int(capability)))
    run, launched = JITFunction.run, []

    def compile_only(self, *arguments, grid, **options):
        launched.append((run(self, *arguments, grid=grid, **options | {"warmup": True}), prod(grid)))

    JITFunction.run = compile_only
    for kernel in (KERNELS[name] for name in names or STRAIGHT):
        for case in kernel.bench:
            arguments = kernel.arguments(case, device="meta", dtype=torch.bfloat16)
            made = kernel.launch(**arguments)[-2 if case.sizes.get("quantize") else -1]
            compiled, programs = launched.pop()
            found, registers = instructions(compiled.asm["cubin"])
            each = made.numel() / (programs * 32 * compiled.metadata.num_warps)
            slots = (found.total() - found["NOP"]) / each
            row = kernel.name, case.name, f"{slots:.1f}", f"{found['MUFU'] / each:.2f}", registers
            sys.stdout.write("\t".join(row) + "\n")


if __name__ == "__main__":
    main()
