"""Pass: a step cache around the denoiser call."""

from __future__ import annotations

import torch

from vivace.cache import spell
from vivace.cache.pab import attentions, broadcasting
from vivace.one_off import give_class
from vivace.passes.target import Pass, Target


def _check(target: Target) -> str | None:
    policy = target.config.cache
    assert policy is not None
    family = target.family
    if policy.blocks and family is None:
        return f"{policy.name} works between the blocks, which are known of no model without a family; use steps"
    if policy.stacked and family is not None and "up_blocks" in family.blocks:
        return (
            f"the stream of a UNet changes shape from block to block, which {policy.name} cannot follow; use deepcache"
        )
    if policy.modules and target.config.fuse == "on":
        return f"{policy.name} works on attention modules, which fused blocks do not call; fuse='off'"
    if policy.modules and target.config.compile == "on":
        return f"{policy.name} decides within the blocks, which a compilation would freeze; compile='off'"
    return policy.refuses(target)


def _apply(target: Target) -> None:
    from vivace.cache.layer import Cache

    policy = target.config.cache
    assert policy is not None
    bound = policy.bind(target)
    for name, lane in target.lanes.items():
        denoiser = target.denoisers[name]
        lane.cache = Cache(bound, denoiser, family=target.family, spelled=spell(policy))
        for inner, module in attentions(denoiser) if policy.modules else ():
            target.undo.callback(give_class(module, broadcasting(inner, module)))
    target.done("cache", _forecast(target))


def _forecast(target: Target) -> str:
    """The policy, and the most that it will hold for a call of the family's usual size."""
    policy = target.config.cache
    assert policy is not None
    held = max((_held(target, denoiser) for denoiser in target.denoisers.values()), default=0)
    return f"{spell(policy)}, at most {held / 2**20:.0f} MiB for each call of a step" if held else spell(policy)


def _held(target: Target, denoiser: torch.nn.Module) -> int:
    """Bytes, from the shapes of one call; 0 where they cannot be told."""
    policy, family = target.config.cache, target.family
    if policy is None or family is None or next(denoiser.parameters()).device.type != "meta":
        return 0
    arguments = family.inputs(denoiser)
    split = family.split(denoiser)
    with torch.no_grad():
        state = split.prologue(**arguments)
    latents = next(arguments[name] for name in ("hidden_states", "sample", "x") if name in arguments)
    output = sum(4 * t.numel() for t in (latents if isinstance(latents, list) else [latents]))
    return policy.holds.nbytes(
        output=output,
        hidden=state.x.nbytes,
        text=0 if state.text is None else state.text.nbytes,
        modules=sum(1 for _ in attentions(denoiser)),
    )


CACHE = Pass(
    name="cache",
    why_here="before graphs: it says which segments of a call they may record",
    wants=lambda config: "off" if config.cache is None else "on",
    check=_check,
    apply=_apply,
    forecast=_forecast,
)
