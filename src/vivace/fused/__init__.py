"""Hand-fused block forwards, by the stem of the family's file. Optional: a family without an entry stays stock."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from vivace.fused.contract import Fused

if TYPE_CHECKING:
    from vivace.family import Family

FUSED: dict[str, str] = {
    "sd": "vivace.fused.sd_unet:SD_UNET",
    "sdxl": "vivace.fused.sd_unet:SD_UNET",
    "lcm": "vivace.fused.sd_unet:SD_UNET",
    "flux": "vivace.fused.flux:FLUX",
    "flux2": "vivace.fused.flux2:FLUX2",
    "sd3": "vivace.fused.sd3:SD3",
    "qwen_image": "vivace.fused.qwen_image:QWEN_IMAGE",
    "z_image": "vivace.fused.z_image:Z_IMAGE",
    "pixart": "vivace.fused.pixart:PIXART",
    "svd": "vivace.fused.svd:SVD",
    "wan": "vivace.fused.wan:WAN",
    "wan_vace": "vivace.fused.wan_vace:WAN_VACE",
}


def fused_of(family: Family | None) -> Fused | None:
    """The fused blocks of a family, or None."""
    if family is None or family.name not in FUSED:
        return None
    module, attribute = FUSED[family.name].split(":")
    return getattr(import_module(module), attribute)
