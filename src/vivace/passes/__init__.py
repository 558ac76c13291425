"""The passes, in the order they are applied; each says why it stands where it does."""

from vivace.passes.accumulate import ACCUMULATE
from vivace.passes.attention import ATTENTION
from vivace.passes.cache import CACHE
from vivace.passes.channels_last import CHANNELS_LAST
from vivace.passes.compile import COMPILE
from vivace.passes.encoders import ENCODERS
from vivace.passes.fuse import FUSE
from vivace.passes.graphs import GRAPHS
from vivace.passes.lora import LORA
from vivace.passes.prompts import PROMPTS
from vivace.passes.quantize import QUANTIZE
from vivace.passes.target import Pass
from vivace.passes.vae import VAE
from vivace.passes.vram import VRAM

PASSES: tuple[Pass, ...] = (
    ATTENTION,
    LORA,
    CHANNELS_LAST,
    VAE,
    QUANTIZE,
    ENCODERS,
    PROMPTS,
    VRAM,
    FUSE,
    COMPILE,
    CACHE,
    ACCUMULATE,
    GRAPHS,
)
