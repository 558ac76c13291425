"""`python compile_for.py CAPABILITY`: compiles the kernels for that GPU, without one.

One line a case: kernel, case, kernels compiled for its size, for another size, launchers built for both, and the width
of the memory accesses.
"""

import sys
from dataclasses import replace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from vivace.kernels import KERNELS


class Absent:
    """Answers what the compiler asks of a driver."""

    def __init__(self, capability):
        self.capability, self.launchers = capability, []

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def launcher_cls(self, source, metadata):
        self.launchers.append(metadata.name)


def other_size(sizes):
    """Another resolution, odd in every way, and another number of samples; of a plain matrix, other rows."""
    if "rows" in sizes:
        return sizes | {"rows": sizes["rows"] + 13}
    grown = {"batch": sizes.get("batch", 1) + 1}
    grown |= {"tokens": sizes["tokens"] + 13} if "tokens" in sizes else {"size": tuple(s + 7 for s in sizes["size"])}
    return sizes | grown | ({"before": sizes["before"] + 5} if "before" in sizes else {})


def distinct(cases, capability):
    """The first case of each head size, and those in fp8: others may need no kernel of their own."""
    # A matrix's depth is another thing.
    depths = {case.sizes.get("depth") if "heads" in case.sizes else None: case for case in reversed(cases)}
    in_fp8 = capability >= 89
    return [case for case in cases if case in depths.values() or (in_fp8 and "fp8" in case.name)]


def writes_little(kernel, case):
    """Whether the results are a few sums, whose width does not matter."""
    arguments = kernel.arguments(case, device="meta", dtype=torch.float16)
    read = sum(a.nbytes for a in arguments.values() if isinstance(a, torch.Tensor))
    return sum(result.nbytes for result in kernel.results(kernel.reference, arguments)) < read / 100


def main():
    capability = int(sys.argv[1])
    absent = Absent(capability)
    triton.runtime.driver.set_active(absent)
    run, compiled = JITFunction.run, {}

    def compile_only(self, *arguments, **options):
        kernel = run(self, *arguments, **options | {"warmup": True})
        compiled[id(kernel)] = kernel

    JITFunction.run = compile_only
    for kernel in (kernel for kernel in KERNELS.values() if kernel.since <= capability):
        # Triton converts to fp8 on sm_89 and newer.
        known = [case for case in kernel.bench if capability >= 89 or case.sizes.get("quantize") != "fp8"]
        for case in distinct(known, capability):
            counts, built = [len(compiled)], len(absent.launchers)
            for sizes in (case.sizes, other_size(case.sizes)):
                case = replace(case, sizes=sizes)
                kernel.launch(**kernel.arguments(case, device="meta", dtype=torch.float16))
                counts.append(len(compiled))
            asm = "".join(c.asm["ptx"] for c in list(compiled.values())[counts[0] :])
            counted = counts[1] - counts[0], counts[2] - counts[1], len(absent.launchers) - built
            row = kernel.name, case.name, *counted, widest(asm, kernel, case)
            sys.stdout.write("\t".join(map(str, row)) + "\n")


def widest(asm, kernel, case):
    # Products load through asynchronous copies, of 16 bytes as well.
    loads = "ld.global.v4.b32" in asm or ("cp.async.cg.shared.global" in asm and ", 0x10" in asm)
    # What is read in 16 bit and written in 8 stays with its thread: 16 bytes in, 8 out.
    stores = "st.global.v4.b32" in asm or (case.sizes.get("quantize") and "st.global.v2.b32" in asm)
    return "wide" if loads and (stores or writes_little(kernel, case)) else "narrow"


if __name__ == "__main__":
    main()
