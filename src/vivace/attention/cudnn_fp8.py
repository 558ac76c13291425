"""cuDNN's fp8 attention, from the plain wheel nvidia-cudnn-frontend. Not exact.

q and k go in with scale 1: e4m3 is a floating format, so a scale only moves what lies beyond 448 or below 2^-6, and a
normalised head of q or k (at most sqrt(D) times the largest weight of its norm, which rotary embedding keeps) is within
that without being looked at. Keys are smoothed by their mean, which softmax does not see (arXiv 2410.02367), so what
all keys share costs no digits. Every head of v is scaled to fill the format; attention's output is an average of rows
of v, so with v's scale it cannot leave the format either, and needs no scale that is known only afterwards.

No scale is shared between samples. Masked calls, and calls of few keys, are native's: fp8 has nothing to gain there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch

from vivace.attention.backend import Backend
from vivace.attention.native import NATIVE
from vivace.errors import InputError, first_line
from vivace.kernels.quant_heads import quant_heads
from vivace.kernels.row import FORMATS, Quantize, RowScaled
from vivace.kernels.unscale_heads import unscale_heads

KEYS = 1024
"""Fewest keys for which fp8 is taken."""

PROBABILITIES = 256.0
"""What softmax's numerators, at most 1, are multiplied with in e4m3: below 2^-17 they are lost."""

LIMIT = FORMATS["fp8"].limit


class Heads(NamedTuple):
    """Attention's output in e4m3: `values * scales` is what was meant."""

    values: torch.Tensor  # [B, S, H, D]
    scales: torch.Tensor  # [B, H]


class Call(NamedTuple):
    """What one recorded graph is for."""

    batch: int
    heads: int
    queries: int
    keys: int
    depth: int
    scale: float
    device: torch.device


def quantised(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, rotate: bool
) -> tuple[torch.Tensor, torch.Tensor, Heads]:
    """q, k and v `[B, S, H, D]` in e4m3: k less its mean over the tokens, both rotated where asked, v scaled."""
    mean = k.mean(1, dtype=torch.float32)
    largest = torch.linalg.vector_norm(v, float("inf"), dim=(1, 3), dtype=torch.float32)
    scales = largest.clamp_min(1e-12) / LIMIT
    return (
        quant_heads(q, rotate=rotate),
        quant_heads(k, mean=mean, rotate=rotate),
        Heads(quant_heads(v, scale=scales), scales),
    )


def attend_heads(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None, rotate: bool = False
) -> Heads:
    """Attention of q, k, v `[B, S, H, D]` in 16 bit, computed and left in e4m3."""
    batch, queries, heads, depth = q.shape
    q8, k8, v8 = quantised(q, k, v, rotate=rotate)
    call = Call(batch, heads, queries, k.shape[1], depth, depth**-0.5 if scale is None else scale, q.device)
    return Heads(_run(call, q8, k8, v8.values), v8.scales)


def rows_of(heads: Heads, *, dtype: torch.dtype, quantize: Quantize | None = None) -> torch.Tensor | RowScaled:
    """`[B, S, H D]` in `dtype`, or row-scaled as a quantised projection takes it."""
    return unscale_heads(heads.values, scale=heads.scales, dtype=dtype, quantize=quantize)


def serves(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether a call is one for fp8."""
    depth = q.shape[-1]
    return mask is None and k.shape[1] >= KEYS and depth % 16 == 0 and depth <= 128


def _attend(q, k, v, *, mask=None, scale=None, rotate):
    if not serves(q, k, mask):
        return NATIVE.attend(q, k, v, mask=mask, scale=scale)
    rotate = rotate and q.shape[-1] in (16, 32, 64, 128)
    rows = rows_of(attend_heads(q, k, v, scale=scale, rotate=rotate), dtype=q.dtype)
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

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(q)
        unread = [torch.empty(1, 1, 1, 1, device=q.device) for _ in self.outputs[1:]]
        pack = dict(zip(self.inputs, (q, k, v), strict=True)) | self._values
        pack |= dict(zip(self.outputs, (out, *unread), strict=True))
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


def _run(call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return _graph(call, threading.get_ident())(q, k, v)


def _backend(name: str, attend: Callable[..., torch.Tensor]) -> Backend:
    return Backend(
        name=name,
        attend=attend,
        since=(9, 0),
        masks=True,
        exact=False,
        leaves=f"native where there is a mask or fewer than {KEYS} keys",
        package="cudnn",
        install="pip install 'vivace[quant]'",
    )


CUDNN_FP8 = _backend("cudnn_fp8", partial(_attend, rotate=False))
CUDNN_FP8_ROTATED = _backend("cudnn_fp8_rotated", partial(_attend, rotate=True))
