"""Pass: a step cache around the denoiser call."""

from __future__ import annotations

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
    target.done("cache", spell(policy))


CACHE = Pass(
    name="cache",
    why_here="before graphs: it says which segments of a call they may record",
    wants=lambda config: "off" if config.cache is None else "on",
    check=_check,
    apply=_apply,
)
