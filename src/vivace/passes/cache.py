"""Pass: a step cache around the denoiser call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vivace.cache import Policy, spell
from vivace.cache.pab import attentions, broadcasting
from vivace.memory.footprint import on_shapes
from vivace.one_off import give_class
from vivace.passes.target import Pass, Target

if TYPE_CHECKING:
    from vivace.family import Family


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
    # Layers that are quantised by now do not say their shapes; a budget's plan asked before.
    kept = target.placement.kept if target.placement else 0
    plain = all(p.is_meta for denoiser in target.denoisers.values() for p in denoiser.parameters())
    held = kept or (held_by(target) if plain else 0)
    return f"{spell(policy)}, at most {-(-held // 2**20)} MiB in a request of the usual size" if held else spell(policy)


def held_by(target: Target) -> int:
    """The most bytes that a request's cache holds, at the size the model is used at; 0 where that cannot be told."""
    if target.config.cache is None or target.family is None:
        return 0
    return sum(_held(target.config.cache, target.family, denoiser) for denoiser in target.denoisers.values())


def _held(policy: Policy, family: Family, denoiser: Any) -> int:
    """Bytes for one denoiser, from the shapes of one call of it."""
    variant = family.nearest(denoiser.config)
    arguments = family.inputs(denoiser, **family.usual(denoiser))
    found = on_shapes(denoiser, family.split(denoiser).prologue, **arguments)
    if found is None:
        return 0
    state, _ = found
    latents = next(arguments[name] for name in ("hidden_states", "sample", "x") if name in arguments)
    one = policy.holds.nbytes(
        output=sum(4 * t.numel() for t in (latents if isinstance(latents, list) else [latents])),
        hidden=state.x.nbytes,
        text=0 if state.text is None else state.text.nbytes,
        modules=sum(1 for _ in attentions(denoiser)),
    )
    # Guidance in two calls has two branches, which remember apart.
    return one * (2 if (variant.guidance_kind or family.guidance) == "two_calls" else 1)


CACHE = Pass(
    name="cache",
    why_here="before graphs: it says which segments of a call they may record",
    wants=lambda config: "off" if config.cache is None else "on",
    check=_check,
    apply=_apply,
    forecast=_forecast,
)
