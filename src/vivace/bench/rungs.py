"""The rungs of a ladder: what people do by hand to make a pipeline fast, one thing on top of the other, then ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vivace.bench.contestant import (
    Contestant,
    compile_whole,
    denoisers_of,
    may_quantise,
    ours_of,
    use_channels_last,
    widen,
)
from vivace.bench.workload import Workload
from vivace.errors import InputError

LADDERS: Mapping[str, str] = {
    "sdxl": "sdxl:base",
    "sd15": "sd:1.5",
    "ssd1b": "sdxl:ssd-1b",
    "pixart": "pixart:sigma",
    "flux": "flux:dev",
    "builtin": "sd3",
}
"""A ladder's name -> the workload under it; `builtin` is the model that comes with the package."""

QUIZ = 24
"""Captions of the built-in model's exam that every rung of its ladder draws."""

Do = Callable[[Any, Workload], str]


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One more thing that is done; every rung does those below it too, and takes over from them where it must."""

    name: str
    do: Do
    columns: Mapping[str, bool]  # of the CSV: what is on from here up
    narrow: bool = False  # has no meaning in float32


def _plain_attention(pipe: Any, workload: Workload) -> str:
    import torch

    # What is left of torch's attention then is two products and a softmax.
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    return "attention as two products and a softmax"


def _as_loaded(pipe: Any, workload: Workload) -> str:
    return workload.dtype


def _sdpa(pipe: Any, workload: Workload) -> str:
    import torch

    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.enable_mem_efficient_sdp(True)
    torch.backends.cuda.enable_cudnn_sdp(True)
    return "SDPA"


def _fuse_qkv(pipe: Any, workload: Workload) -> str:
    done = []
    for part in (*denoisers_of(pipe, workload), getattr(pipe, "vae", None)):
        if part is not None and hasattr(part, "fuse_qkv_projections"):
            part.fuse_qkv_projections()
            done.append(type(part).__name__)
    if not done:
        raise InputError(f"not offered by {type(pipe).__name__}")
    return f"fuse_qkv_projections of {', '.join(done)}"


def _compile(pipe: Any, workload: Workload) -> str:
    done = []
    for part in (*denoisers_of(pipe, workload), pipe.vae.decoder):
        use_channels_last(part)
        done.append(f"{type(part).__name__} (mode={compile_whole(part)!r})")
    return f"torch.compile(fullgraph=True) of {', '.join(done)}, channels_last"


def _int8(pipe: Any, workload: Workload) -> str:
    import torch

    try:
        from torchao.quantization import (  # pyright: ignore[reportMissingImports]
            Int8DynamicActivationInt8WeightConfig,
            quantize_,
        )
    except ImportError as error:
        raise ModuleNotFoundError("torchao is not installed; pip install -c constraints.txt torchao") from error

    def wanted(module: torch.nn.Module, name: str) -> bool:
        return may_quantise(module, name, workload) and min(module.in_features, module.out_features) >= 512

    for part in denoisers_of(pipe, workload):
        quantize_(part, Int8DynamicActivationInt8WeightConfig(), filter_fn=wanted)
    return "torchao int8, dynamic"


RUNGS: tuple[Rung, ...] = (
    Rung(name="fp32, plain", do=_plain_attention, columns={}),
    Rung(name="+ 16 bit", do=_as_loaded, columns={"bf16": True}, narrow=True),
    Rung(name="+ SDPA", do=_sdpa, columns={"sdpa": True}),
    Rung(name="+ fused QKV", do=_fuse_qkv, columns={"fused_qkv_projections": True}),
    Rung(name="+ compile", do=_compile, columns={"compile": True}),
    Rung(name="+ int8", do=_int8, columns={"do_quant": True}),
)
"""As diffusion-fast climbed them, int8 applied before the compilation that it needs."""


def columns_of(name: str) -> dict[str, bool]:
    """What is on at the rung of that name; nothing of it for ours."""
    names = [rung.name for rung in RUNGS]
    below = RUNGS[: names.index(name) + 1] if name in names else ()
    return {key: value for rung in below for key, value in rung.columns.items()}


def climb(pipe: Any, workload: Workload, *, to: str) -> str:
    """Do everything up to the rung `to`; returns what was done in a line."""
    index = [rung.name for rung in RUNGS].index(to)
    rungs = [rung for rung in RUNGS[: index + 1] if not (rung.narrow and workload.dtype == "float32")]
    # What is quantised must be so before it is compiled.
    order = sorted(rungs, key=lambda rung: rung.do is _compile)
    said = [rung.do(pipe, workload) for rung in order]
    return "; ".join([widen(pipe, workload), *said] if index == 0 else said)


def rungs_of(workload: Workload, *, presets: Sequence[str], fields: Sequence[str] = ()) -> list[Contestant]:
    """Every rung that the workload's type has, then our presets."""
    ours = ours_of(presets, fields)
    quiz = QUIZ if workload.model == "builtin" else 0
    steps = [
        Contestant(name=rung.name, rung=True) for rung in RUNGS if not (rung.narrow and workload.dtype == "float32")
    ]
    return [replace(one, quiz=quiz) for one in (*steps, *ours)]
