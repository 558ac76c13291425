"""Sends the attention of stock modules to a backend, for the length of one denoiser call.

Diffusers reaches attention in several ways (old processors, the dispatcher, models of their own); all of them end in
`torch.nn.functional.scaled_dot_product_attention`, so that is where the route lies. It is a mode on torch's own
per-thread stack: nothing is patched, and other threads and models see nothing of it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from vivace.attention.backend import Attend, Backend, cannot


class Route(TorchFunctionMode):
    """While active, scaled dot product attention runs on `backend`."""

    def __init__(self, backend: Backend, *, attend: Attend | None = None) -> None:
        super().__init__()
        self.backend = backend
        self.attend = attend or backend.attend

    def __torch_function__(self, func, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return self._attention(*args, **kwargs)

    def _attention(
        self,
        query: torch.Tensor,  # [B, H, Sq, D]
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        backend = self.backend
        special = {"a mask": attn_mask is not None and not backend.masks, "dropout": dropout_p, "causal": is_causal}
        special["grouped heads"] = enable_gqa and query.shape[1] != key.shape[1]
        found = [name for name, present in special.items() if present]
        if found and backend.name == "native":
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if found:
            raise cannot(backend, " and ".join(found), query.shape)
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        return self.attend(q, k, v, mask=attn_mask, scale=scale).transpose(1, 2)
