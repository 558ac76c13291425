"""Pictures turned into bytes where they were computed: the same bytes, and less to copy to the host."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from vivace.one_off import give_class


def on_device(processor: Any) -> Callable[[], None] | None:
    """Let `processor.postprocess` make the bytes of "pil" pictures on their device; returns the undo.

    None for a processor whose steps are its own.
    """
    stock = type(processor)
    own = (getattr(stock, name, None) for name in ("postprocess", "pt_to_numpy", "numpy_to_pil", "denormalize"))
    if not isinstance(processor, VaeImageProcessor) or any(
        method is not getattr(VaeImageProcessor, getattr(method, "__name__", ""), None) for method in own
    ):
        return None

    @functools.wraps(stock.postprocess)
    def postprocess(self: Any, image: Any, output_type: str = "pil", do_denormalize: Any = None) -> Any:
        if output_type != "pil" or not isinstance(image, torch.Tensor) or image.ndim != 4 or image.shape[1] != 3:
            return stock.postprocess(self, image, output_type, do_denormalize)
        return pictures(stock.postprocess(self, image, "pt", do_denormalize))

    return give_class(processor, {"postprocess": postprocess})


def pictures(images: torch.Tensor) -> list[Image.Image]:
    """`images` [B, 3, H, W] from 0 to 1 as pictures, rounded as stock does it."""
    levels = (images.float() * 255).round().to(torch.uint8)
    return [Image.fromarray(one) for one in levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()]
