"""What FLUX.1 and FLUX.2 share: double blocks and then single ones, whose tokens all have rotary positions."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from vivace.family import Block
from vivace.fused.contract import foreign_attention
from vivace.fused.heads import Tokens
from vivace.fused.joint import JointBlock, chained
from vivace.fused.single import SingleBlock

LISTS = ("transformer_blocks", "single_transformer_blocks")


class Double(Protocol):
    """Builds the double block of a module; `index` is its place among them."""

    def __call__(self, block: Any, *, index: int) -> JointBlock: ...


class Single(Protocol):
    """Builds the single block of a module; `index` is its place among them, behind the `first` double ones."""

    def __call__(self, block: Any, *, index: int, first: int) -> SingleBlock: ...


def foreign(denoiser: Any, *, known: tuple[type, ...]) -> str | None:
    """Why an attention of a block does not compute what is fused, or None."""
    lists = ((name, getattr(denoiser, name)) for name in LISTS)
    attentions = ((f"{name}.{index}", block.attn) for name, blocks in lists for index, block in enumerate(blocks))
    return foreign_attention(attentions, known=known)


def blocks_of(denoiser: Any, *, double: Double, single: Single) -> tuple[Block, ...]:
    """All blocks of a denoiser, in their order."""
    doubles, singles = (getattr(denoiser, name) for name in LISTS)
    return (
        *chained(LISTS[0], doubles, [double(block, index=i) for i, block in enumerate(doubles)]),
        *chained(LISTS[1], singles, [single(block, index=i, first=len(doubles)) for i, block in enumerate(singles)]),
    )


def positions(denoiser: Any, txt_ids: torch.Tensor, img_ids: torch.Tensor) -> Tokens:
    """The rotary angles of the text's tokens and then the picture's, from their positions [T, axes] and [S, axes]."""
    # Positions once had a batch dimension.
    ids = torch.cat([ids[0] if ids.ndim == 3 else ids for ids in (txt_ids, img_ids)])
    cos, sin = denoiser.pos_embed(ids)  # [T + S, head size], each angle twice
    return Tokens(cos=cos[:, ::2].contiguous(), sin=sin[:, ::2].contiguous())
