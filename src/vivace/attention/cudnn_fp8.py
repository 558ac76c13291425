"""cuDNN's fp8 attention, from the plain wheel nvidia-cudnn-frontend. Not exact.

Fused blocks that normalise q and k write them in e4m3 in the same pass, with scales that the norms' bounds give
(`fused/heads.py`). What comes in 16 bit goes in with scale 1, for e4m3 is a floating format: a scale only moves what
lies beyond 448 or below 2^-6. Such keys, which no norm bounds, are smoothed by their mean, which softmax does not see
(arXiv 2410.02367), so that what all of them share costs no digits; after a norm that was measured to do nothing. Every
head of v is scaled to fill the format; attention's output is an average of rows of v, so with v's scale it cannot leave
the format either, and needs no scale that is known only afterwards.

No scale is shared between samples. Masked calls, and calls of few keys, are native's: fp8 has nothing to gain there.
"""

from __future__ import annotations

import threading
from collections.abc import Container
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch

from vivace.attention.backend import Backend
from vivace.attention.native import NATIVE
from vivace.attention.packed import Operands, Packed
from vivace.errors import InputError, first_line, install
from vivace.kernels.quant_heads import quant_heads
from vivace.kernels.row import FORMATS, HeadScaled
from vivace.kernels.unscale_heads import unscale_heads

KEYS = 1024
"""Fewest keys for which fp8 is taken."""

WINS: dict[tuple[int, int], dict[int, str]] = {
    (9, 0): {128: "917 TFLOP/s over 4608 tokens, 16 bit 647"},
}
"""Compute capability -> head size -> what was measured, where fp8 is quicker than 16 bit."""

PROBABILITIES = 256.0
"""What softmax's numerators, at most 1, are multiplied with in e4m3: below 2^-17 they are lost."""

LIMIT = FORMATS["fp8"].limit


class Call(NamedTuple):
    """What one recorded graph is for."""

    batch: int
    heads: int
    queries: int
    keys: int
    depth: int
    scale: float
    device: torch.device


def packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, rotate: bool) -> Operands:
    """q, k and v `[B, S, H, D]` in e4m3: k less its mean over the tokens, both rotated where asked, v scaled."""
    rotate = rotate and q.shape[-1] in (16, 32, 64, 128)
    mean = k.mean(1, dtype=torch.float32)
    largest = torch.linalg.vector_norm(v, float("inf"), dim=(1, 3), dtype=torch.float32)
    scales = largest.clamp_min(1e-12) / LIMIT
    return Operands(
        quant_heads(q, rotate=rotate),
        quant_heads(k, mean=mean, rotate=rotate),
        HeadScaled(quant_heads(v, scale=scales), scales),
    )


def attend_packed(operands: Operands, *, scale: float | None = None) -> HeadScaled:
    """Attention of what is in e4m3, left in e4m3."""
    q, k, v, descale = operands
    batch, queries, heads, depth = q.shape
    call = Call(batch, heads, queries, k.shape[1], depth, depth**-0.5 if scale is None else scale, q.device)
    return HeadScaled(_run(call, q, k, v.values, descale), v.scales)


def serves(
    *, keys: int, depth: int, mask: torch.Tensor | None = None, depths: Container[int] = range(16, 129, 16)
) -> bool:
    """Whether a call is one for fp8, where heads of `depths` are."""
    return mask is None and keys >= KEYS and depth in depths


def _attend(q, k, v, *, mask=None, scale=None, rotate, serves):
    if not serves(keys=k.shape[1], depth=q.shape[-1], mask=mask):
        return NATIVE.attend(q, k, v, mask=mask, scale=scale)
    rows = unscale_heads(attend_packed(packed(q, k, v, rotate=rotate), scale=scale), dtype=q.dtype)
    assert isinstance(rows, torch.Tensor)
    return rows.unflatten(2, q.shape[2:])


class Graph:
    """One cuDNN graph, built for one `Call`."""

    def __init__(self, call: Call) -> None:
        import cudnn  # pyright: ignore[reportMissingImports]

        kind = cudnn.data_type
        graph = cudnn.pygraph(
            io_data_type=kind.FP8_E4M3, intermediate_data_type=kind.FLOAT, compute_data_type=kind.FLOAT
        )

        def heads(tokens: int) -> Any:
            # [B, H, S, D] over memory of [B, S, H, D].
            row = call.heads * call.depth
            dim, stride = (call.batch, call.heads, tokens, call.depth), (tokens * row, call.depth, row, 1)
            return graph.tensor(dim=dim, stride=stride, data_type=kind.FP8_E4M3)

        def scalar() -> Any:
            return graph.tensor(dim=(1, 1, 1, 1), stride=(1, 1, 1, 1), data_type=kind.FLOAT)

        names = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")
        self.inputs = [heads(call.queries), heads(call.keys), heads(call.keys)]
        self.scalars = {name: scalar() for name in names}
        out, _, *largest = graph.sdpa_fp8(
            q=self.inputs[0], k=self.inputs[1], v=self.inputs[2], **self.scalars,
            generate_stats=False, attn_scale=call.scale,
        )  # fmt: skip
        row = call.heads * call.depth
        out.set_output(True).set_dim((call.batch, call.heads, call.queries, call.depth))
        out.set_stride((call.queries * row, call.depth, row, 1)).set_data_type(kind.FP8_E4M3)
        for amax in largest:
            amax.set_output(True).set_dim((1, 1, 1, 1)).set_stride((1, 1, 1, 1)).set_data_type(kind.FLOAT)
        self.outputs, self._graph, self._cudnn = [out, *largest], graph, cudnn
        try:
            graph.validate()
            graph.build_operation_graph()
            graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
            graph.check_support()
            graph.build_plans()
        except Exception as error:
            raise InputError(
                f"cuDNN has no fp8 attention for {call}: {first_line(error)}; use attention='native'"
            ) from error
        values = {"descale_s": 1 / PROBABILITIES, "scale_s": PROBABILITIES}
        self._values = {
            self.scalars[name]: torch.full((1, 1, 1, 1), values.get(name, 1.0), device=call.device) for name in names
        }
        self._workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device=call.device)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, descale: torch.Tensor | None) -> torch.Tensor:
        out = torch.empty_like(q)
        unread = [torch.empty(1, 1, 1, 1, device=q.device) for _ in self.outputs[1:]]
        pack = dict(zip(self.inputs, (q, k, v), strict=True)) | self._values
        pack |= dict(zip(self.outputs, (out, *unread), strict=True))
        if descale is not None:
            pack[self.scalars["descale_q"]] = descale
        handle = _handle(q.device, threading.get_ident())
        self._cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(q.device).cuda_stream)
        self._graph.execute(pack, self._workspace, handle=handle)
        return out


@lru_cache(maxsize=16)
def _handle(device: torch.device, thread: int) -> Any:
    # cuDNN forbids sharing a handle between threads.
    import cudnn  # pyright: ignore[reportMissingImports]

    with torch.cuda.device(device):
        return cudnn.create_handle()


@lru_cache(maxsize=64)
def _graph(call: Call, thread: int) -> Graph:
    # Per thread too, since calls of two threads would share one workspace.
    with torch.cuda.device(call.device):
        return Graph(call)


def _run(call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, descale: torch.Tensor | None) -> torch.Tensor:
    return _graph(call, threading.get_ident())(q, k, v, descale)


def _backend(name: str, *, rotate: bool) -> Backend:
    return Backend(
        name=name,
        attend=Packed(
            attend=partial(_attend, rotate=rotate, serves=serves),
            serves=serves,
            pack=partial(packed, rotate=rotate),
            heads=attend_packed,
            scales_only=not rotate,
        ),
        since=(9, 0),
        masks=True,
        exact=False,
        leaves=f"native where there is a mask or fewer than {KEYS} keys",
        package="cudnn",
        install=install("quant"),
    )


CUDNN_FP8 = _backend("cudnn_fp8", rotate=False)
CUDNN_FP8_ROTATED = _backend("cudnn_fp8_rotated", rotate=True)


def where_it_wins(device: torch.device) -> Backend | None:
    """fp8 for the head sizes alone that were measured to gain on that GPU; None where none was."""
    wins = WINS.get(torch.cuda.get_device_capability(device), {}) if device.type == "cuda" else {}
    if not wins:
        return None
    serves_those, packed = partial(serves, depths=tuple(wins)), CUDNN_FP8.attend
    assert isinstance(packed, Packed)
    measured = " and ".join(f"head size {depth} ({why})" for depth, why in wins.items())
    return replace(
        CUDNN_FP8,
        attend=replace(packed, attend=partial(_attend, rotate=False, serves=serves_those), serves=serves_those),
        leaves=f"for {measured}, native else, with a mask or under {KEYS} keys",
    )
