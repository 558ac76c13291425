"""Memory-efficient attention from the xformers wheel."""

from __future__ import annotations

import torch

from vivace.attention.backend import Backend


def _xformers(q, k, v, *, mask=None, scale=None):
    from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]

    return memory_efficient_attention(q, k, v, scale=scale)


XFORMERS = Backend(
    name="xformers",
    attend=_xformers,
    dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32}),
    package="xformers",
    install="pip install xformers",
)
