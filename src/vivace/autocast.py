"""`torch.autocast`: whether a call stands under it, which casts linears behind everyone's back."""

from __future__ import annotations

import torch


def autocast_type(device: torch.device) -> torch.dtype | None:
    """The type in which products on `device` are computed by autocast, None where it is off."""
    kind = device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None
