"""An autoencoder that overflows in float16 brought into its range, exactly: by a power of two that norms undo.

What overflows is the stream between the residual blocks, and the convolutions that write to it. Every reader of either
is a group norm, and a group norm does not see a factor (but for its eps, which takes the factor's square). So all that
writes is multiplied by 2^-k, weights and biases, and the picture comes out as in 32 bit, rounded as float16 is: eight
times finer than bfloat16, and on cards that have no bfloat16 too.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D

from vivace.one_off import give_class

LARGEST = torch.finfo(torch.float16).max
MARGIN = 32
"""How far real pictures may go beyond the noise that the range is measured with."""
SIDE = 16
"""Latent rows and columns that it is measured with."""


def overflows(vae: Any) -> bool:
    """Whether its pipeline would widen this autoencoder to float32 for every picture."""
    return vae.dtype == torch.float16 and bool(vae.config.get("force_upcast"))


def refuses(vae: Any) -> str | None:
    """Why an autoencoder cannot be brought into float16's range, or None."""
    if type(getattr(vae, "decoder", None)) is not Decoder or type(getattr(vae, "encoder", None)) is not Encoder:
        return f"a {type(vae).__name__} has other blocks"
    known = (ResnetBlock2D, Attention, Upsample2D, Downsample2D, Encoder, Decoder)
    owned = {id(c) for m in vae.modules() if isinstance(m, known) for c in m.children()}
    loose = (m for m in (*vae.encoder.modules(), *vae.decoder.modules()) if isinstance(m, torch.nn.Conv2d))
    return "it has convolutions outside of its blocks" if any(id(m) not in owned for m in loose) else None


@torch.no_grad()
def exponent(vae: Any) -> int | None:
    """The k for which 2^-k brings everything into float16's range with `MARGIN` to spare, measured in float32.

    None where not even float32 holds it.
    """
    wide, found = copy.deepcopy(vae).float(), []

    def note(module: Any, arguments: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            found.append(output.abs().amax())

    for module in (*wide.encoder.modules(), *wide.decoder.modules()):
        module.register_forward_hook(note)
    draw = torch.Generator().manual_seed(0)
    side = SIDE * 2 ** (len(wide.decoder.up_blocks) - 1)
    z = torch.randn(1, wide.config["latent_channels"], SIDE, SIDE, generator=draw) / wide.config["scaling_factor"]
    wide.decode(z.to(vae.device))
    wide.encode((torch.rand(1, 3, side, side, generator=draw) * 2 - 1).to(vae.device))
    largest = torch.stack(found).max().item()
    return max(0, math.ceil(math.log2(largest * MARGIN / LARGEST))) if math.isfinite(largest) else None


class Scaled:
    """An autoencoder in whose blocks all that writes to a stream is multiplied by 2^-exponent."""

    def __init__(self, vae: Any, exponent: int) -> None:
        self.vae, self.factor = vae, 2.0**-exponent
        self._originals: list[tuple[torch.nn.Parameter, torch.Tensor]] = []

    def install(self, *, undo: ExitStack) -> None:
        """Scale it, and let its pipeline know that it need not widen it.

        What is saved, copied or loaded is as it was, and so is what it shows of itself.
        """
        self.put_on()
        undo.callback(self.take_back)
        undo.callback(give_class(self.vae, self._members(type(self.vae))))

    def _members(self, stock: Any) -> dict[str, Any]:
        scaled = self

        @functools.wraps(stock.save_pretrained)
        def save_pretrained(vae: Any, *args: Any, **kwargs: Any) -> Any:
            with scaled.lifted():
                return stock.save_pretrained(vae, *args, **kwargs)

        @functools.wraps(stock.state_dict)
        def state_dict(vae: Any, *args: Any, **kwargs: Any) -> Any:
            found = stock.state_dict(vae, *args, **kwargs)
            if vae is scaled.vae and not kwargs.get("keep_vars"):
                found.update(scaled.originals(prefix=kwargs.get("prefix", "")))
            return found

        @functools.wraps(stock.load_state_dict)
        def load_state_dict(vae: Any, *args: Any, **kwargs: Any) -> Any:
            with scaled.lifted():
                result = stock.load_state_dict(vae, *args, **kwargs)
                # Other weights, another range.
                scaled.factor = 2.0 ** -(exponent(vae) or 0)
            return result

        def __getstate__(vae: Any) -> dict[str, Any]:
            with scaled.lifted():
                return copy.deepcopy(vae.__dict__)

        members = (save_pretrained, state_dict, load_state_dict, __getstate__)
        return {member.__name__: member for member in members}

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """The weights as they were, for a while."""
        on = bool(self._originals)
        if on:
            self.take_back()
        try:
            yield
        finally:
            if on:
                self.put_on()

    def originals(self, *, prefix: str) -> dict[str, torch.Tensor]:
        """What was scaled as it was, by its name; nothing while it is lifted."""
        names = {id(parameter): name for name, parameter in self.vae.named_parameters()}
        known = [(names.get(id(parameter)), parameter, original) for parameter, original in self._originals]
        return {f"{prefix}{name}": original.to(one.device, one.dtype) for name, one, original in known if name}

    def put_on(self) -> None:
        for parameter in _writers(self.vae):
            # On the host, because scaling loses the last bits of what is smallest.
            self._originals.append((parameter, parameter.detach().to("cpu", copy=True)))
            parameter.data.mul_(self.factor)
        for norm in _norms(self.vae):
            norm.eps *= self.factor**2
        self.vae.register_to_config(force_upcast=False)

    def take_back(self) -> None:
        for parameter, original in self._originals:
            parameter.data.copy_(original)
        self._originals.clear()
        for norm in _norms(self.vae):
            norm.eps /= self.factor**2
        self.vae.register_to_config(force_upcast=True)


def _writers(vae: Any) -> Iterator[torch.nn.Parameter]:
    """Weights and biases that write to a stream or to a norm; only biases of what maps a stream to a stream."""
    for module in (*vae.encoder.modules(), *vae.decoder.modules()):
        made: list[Any] = []
        passed: list[Any] = []
        if isinstance(module, Encoder | Decoder):
            made = [module.conv_in]
        elif isinstance(module, ResnetBlock2D):
            made, passed = [module.conv1, module.conv2], [module.conv_shortcut]
        elif isinstance(module, Attention):
            projections: Any = module.to_out
            made = [projections[0]]
        elif isinstance(module, Upsample2D | Downsample2D):
            passed = [module.conv]
        yield from (layer.weight for layer in made)
        yield from (layer.bias for layer in (*made, *passed) if getattr(layer, "bias", None) is not None)


def _norms(vae: Any) -> Iterator[torch.nn.GroupNorm]:
    yield from (m for part in (vae.encoder, vae.decoder) for m in part.modules() if isinstance(m, torch.nn.GroupNorm))
