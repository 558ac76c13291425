"""What the frozen teacher makes of a noisy picture inside: a UNet's mid block, a transformer's hidden states."""

from __future__ import annotations

from typing import Any

import torch

from vivace.distill.student import again
from vivace.errors import InputError
from vivace.family import Split


class Features:
    """The output of one block of a frozen denoiser, as a map [B, C, h, w]; what comes after the block is not run."""

    def __init__(self, split: Split, *, block: str | None = None, recompute: bool = False) -> None:
        names = [one.name for one in split.blocks]
        chosen = block or ("mid_block" if "mid_block" in names else names[len(names) // 2 - 1])
        if chosen not in names:
            raise InputError(f"the teacher has no block {chosen!r}; it has {', '.join(names)}")
        self.split = split
        self.block = chosen
        self.blocks = split.blocks[: names.index(chosen) + 1]
        self.recompute = recompute  # in the backward pass, in place of keeping activations

    def __call__(self, *, sides: tuple[int, int], **kwargs: Any) -> torch.Tensor:
        """The map for one denoiser call; `sides` are the latents' height and width."""
        kwargs.pop("return_dict", None)
        if self.split.once is not None:
            kwargs["once"] = self.split.prepare(kwargs)
        state = self.split.ready(self.split.prologue(**kwargs), 0, len(self.blocks))
        for block in self.blocks:
            recompute = self.recompute and torch.is_grad_enabled()
            state = again(block.forward, state) if recompute else block.forward(state)
        return spread(state.x, sides=sides)


def spread(x: torch.Tensor, *, sides: tuple[int, int]) -> torch.Tensor:
    """Tokens [B, S, C] as a map [B, C, h, w] with the proportions of latents of `sides`; a map stays one."""
    if x.ndim == 4:
        return x
    height, width = sides
    patch = round((height * width / x.shape[1]) ** 0.5)
    return x.transpose(1, 2).unflatten(2, (height // patch, width // patch))
