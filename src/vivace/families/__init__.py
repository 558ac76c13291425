"""The families, one line each; a family's module holds its facts and imports torch only inside its functions."""

from vivace.families.flux import FLUX
from vivace.families.flux2 import FLUX2
from vivace.families.lcm import LCM
from vivace.families.pixart import PIXART
from vivace.families.qwen_image import QWEN_IMAGE
from vivace.families.sd import SD
from vivace.families.sd3 import SD3
from vivace.families.sdxl import SDXL
from vivace.families.svd import SVD
from vivace.families.wan import WAN
from vivace.families.wan_vace import WAN_VACE
from vivace.families.z_image import Z_IMAGE
from vivace.family import Family

FAMILIES: dict[str, Family] = {
    "sd": SD,
    "sdxl": SDXL,
    "lcm": LCM,
    "svd": SVD,
    "pixart": PIXART,
    "flux": FLUX,
    "sd3": SD3,
    "qwen_image": QWEN_IMAGE,
    "wan": WAN,
    "flux2": FLUX2,
    "z_image": Z_IMAGE,
    "wan_vace": WAN_VACE,
}
