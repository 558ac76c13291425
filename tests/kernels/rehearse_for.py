"""`python rehearse_for.py CAPABILITY FAMILY[:fp8] ...`: which kernels full-size models need on that GPU, without one.

One line a family: kernels that the rehearsal meets, and how many more other resolutions and batches need.
"""

import sys
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace

import torch
import triton
from compile_for import Absent

from vivace.attention.cudnn_fp8 import CUDNN_FP8
from vivace.families import FAMILIES
from vivace.fused import fused_of
from vivace.kernels.rehearsal import rehearse, without_values
from vivace.kernels.row import HeadScaled
from vivace.passes.fuse import SIDES
from vivace.quant import format_of
from vivace.quant.layers import survey
from vivace.quant.linear import QuantLinear

PLAIN = lambda q, k, v, **_: torch.empty_like(q)  # noqa: E731
PACKED = replace(
    CUDNN_FP8.attend, attend=PLAIN, heads=lambda made, **_: HeadScaled(torch.empty_like(made.q), made.v.scales)
)
OTHERS = ((512, 512), (1024, 1024), (1344, 768), (272, 336))


def without_repeats(denoiser):
    """Leaves two blocks of each shape, and the last of each list: the others launch what these do."""
    for blocks in [module for module in denoiser.modules() if isinstance(module, torch.nn.ModuleList)]:
        shapes = [tuple(p.shape for p in block.parameters()) for block in blocks]
        for index in reversed(range(len(blocks) - 1)):
            if shapes[index] in shapes[:index] and shapes[:index].count(shapes[index]) > 1:
                del blocks[index]


def in_fp8(denoiser, family):
    for layer in survey(
        denoiser,
        **{"format": format_of("fp8"), "device": torch.device("cpu")},
        **{"keep": family.keep_16bit, "one_row": family.one_row, "all_that_fit": True, "planned": True},
    ):
        if layer.format:
            linear = denoiser.get_submodule(layer.name)
            denoiser.set_submodule(layer.name, QuantLinear.of(linear, format=format_of(layer.format)))


def main():
    capability, *families = sys.argv[1:]
    triton.runtime.driver.set_active(Absent(int(capability)))
    keys = set()

    def note_and_stop(*, key, fn, is_manual_warmup, **rest):
        assert is_manual_warmup, f"{fn.name} would be launched, on tensors that have no memory"
        keys.add((fn.name, key))
        return True

    triton.knobs.runtime.jit_cache_hook = note_and_stop
    for spelled in families:
        keys.clear()
        name, _, fp8 = spelled.partition(":")
        family = FAMILIES[name]
        denoiser = family.full(device="meta", dtype=torch.bfloat16)
        without_repeats(denoiser)
        if fp8:
            in_fp8(denoiser, family)
        for module in denoiser.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.to(memory_format=torch.channels_last)
        stand_in = SimpleNamespace(
            **{"config": denoiser.config, "device": torch.device("cpu"), "dtype": torch.bfloat16},
            use_additional_conditions=getattr(denoiser, "use_additional_conditions", None),
        )

        tokens = 1 if family.variant().text_tokens == 1 else 77 + 256

        def inputs(size, batch, stand_in=stand_in, family=family, tokens=tokens):
            return without_values(family.inputs(stand_in, size=size, batch=batch, frames=1, text_tokens=tokens, seed=0))

        fused = fused_of(family)
        counts = [0]
        for sizes in ([((side, side), 2) for side in SIDES], [(size, batch) for size in OTHERS for batch in (1, 3)]):
            for attend in (PLAIN, PACKED) if fp8 else (PLAIN,):
                with ExitStack() as undo:
                    rehearse(fused.fuse(denoiser, attend=attend, undo=undo), [inputs(*size) for size in sizes])
            counts.append(len(keys))
        sys.stdout.write(f"{spelled}\t{counts[1]}\t{counts[2] - counts[1]}\n")


if __name__ == "__main__":
    main()
