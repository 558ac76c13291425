"""Pass: regional torch.compile, one compilation for all blocks of a kind."""

from __future__ import annotations

import torch

from vivace.passes.fuse import check_fuse
from vivace.passes.target import Pass, Target


def _check(target: Target) -> str | None:
    config = target.config
    fuses = check_fuse(target) is None
    if target.placement is not None and target.placement.moves:
        return target.placement.moves
    if config.compile == "on" and config.fuse == "on":
        return "fuse='on' takes the same blocks; ask for one of the two"
    if config.compile == "auto" and fuses:
        return "the blocks are fused by hand"
    if config.compile == "auto" and config.cache is not None and config.cache.modules:
        return f"cache={config.cache.name!r} answers for each attention module, which would be compiled one by one"
    if config.compile == "auto" and target.device.type != "cuda":
        return f"on {target.device.type} compiling takes longer than it saves; compile='on' asks for it"
    if not any(True for _ in target.repeated_blocks()):
        return "the denoiser has no repeated blocks"
    return None


def _apply(target: Target) -> None:
    blocks = [block for _, block in target.repeated_blocks()]
    for block in blocks:
        block.compile()
        target.undo.callback(_uncompile, block)
    target.done("compile", _forecast(target))


def _forecast(target: Target) -> str:
    blocks = [type(block).__name__ for _, block in target.repeated_blocks()]
    kinds = sorted(set(blocks))
    return f"{len(blocks)} blocks of {len(kinds)} kinds ({', '.join(kinds)})"


def _uncompile(block: torch.nn.Module) -> None:
    block._compiled_call_impl = None


COMPILE = Pass(
    name="compile",
    why_here="after fuse: it takes the blocks that stayed stock",
    wants=lambda config: config.compile,
    check=_check,
    apply=_apply,
    forecast=_forecast,
)
