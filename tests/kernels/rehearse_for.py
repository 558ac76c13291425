"""`python rehearse_for.py CAPABILITY FAMILY ...`: which kernels full-size models need on that GPU, without one.

One line a family: kernels that the rehearsal meets, and how many more other resolutions and batches need.
"""

import importlib
import sys
from contextlib import ExitStack
from types import SimpleNamespace

import torch
import triton
from compile_for import Absent

from vivace.families import FAMILIES
from vivace.fused import fused_of
from vivace.kernels.rehearsal import rehearse, without_values
from vivace.passes.fuse import SIDES

OTHERS = ((512, 512), (1024, 1024), (1344, 768), (272, 336))


def main():
    capability, *families = sys.argv[1:]
    triton.runtime.driver.set_active(Absent(int(capability)))
    keys = set()

    def note_and_stop(*, key, fn, **rest):
        keys.add((fn.name, key))
        return True

    triton.knobs.runtime.jit_cache_hook = note_and_stop
    for name in families:
        keys.clear()
        family = FAMILIES[name]
        denoiser = family.full(device="meta", dtype=torch.bfloat16)
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
        importlib.import_module(fused.fuse.__module__)
        with ExitStack() as undo:
            call = fused.fuse(denoiser, attend=lambda q, k, v, **_: torch.empty_like(q), undo=undo)
            rehearse(call, [inputs((side, side), 2) for side in SIDES])
            rehearsed = len(keys)
            rehearse(call, [inputs(size, batch) for size in OTHERS for batch in (1, 3)])
        sys.stdout.write(f"{name}\t{rehearsed}\t{len(keys) - rehearsed}\n")


if __name__ == "__main__":
    main()
