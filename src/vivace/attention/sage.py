"""SageAttention: int8 q k, 16-bit or fp8 v (arXiv 2411.10958). Not exact."""

from __future__ import annotations

from vivace.attention.backend import Backend


def _sage(q, k, v, *, mask=None, scale=None):
    from sageattention import sageattn  # pyright: ignore[reportMissingImports]

    return sageattn(q, k, v, tensor_layout="NHD", sm_scale=scale)


SAGE = Backend(
    name="sage",
    attend=_sage,
    exact=False,
    returns_lse=True,
    depth=128,
    package="sageattention",
    install="pip install sageattention",
)
