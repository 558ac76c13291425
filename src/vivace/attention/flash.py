"""FlashAttention from the flash-attn wheel (Dao, arXiv 2307.08691)."""

from __future__ import annotations

from vivace.attention.backend import Backend


def _flash(q, k, v, *, mask=None, scale=None):
    from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]

    return flash_attn_func(q, k, v, softmax_scale=scale)


FLASH = Backend(
    name="flash",
    attend=_flash,
    returns_lse=True,
    depth=256,
    package="flash_attn",
    install="pip install flash-attn",
)
