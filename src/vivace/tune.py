"""`tune`: what this model does best with on this machine, measured: other ways to the same, presets, step caches."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from math import inf, nan
from typing import Any, Literal

from vivace.attention import BACKENDS
from vivace.cache import parse, spell
from vivace.config import PRESETS, Config
from vivace.errors import InputError, first_line
from vivace.evals.contest import Contest, Contestant
from vivace.evals.verdict import Verdict, judge

logger = logging.getLogger(__name__)

# From gentle to bold; what a model cannot take is left out with its reason.
CACHES = (
    *(f"firstblock:threshold={t}" for t in (0.05, 0.1, 0.15, 0.2, 0.3)),
    *(f"firstblock:threshold={t},order=1" for t in (0.1, 0.2)),
    *(f"teacache:threshold={t}" for t in (0.1, 0.2, 0.4)),
    *(f"planned:computed={c}" for c in (0.67, 0.5, 0.33, 0.25)),
    *(f"taylorseer:interval={i}" for i in (2, 3, 4)),
    *(f"meancache:of50={n}" for n in (30, 25, 17)),
    *(f"deepcache:interval={i}" for i in (2, 3, 5)),
    "guidance:every=2",
    "guidance:every=4",
)


CLEARLY = 1.05
"""Times as fast, from which on a preset is a base of its own for step caches."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is asked for: the fastest that is at least this close, or the closest that is at least this fast."""

    kind: Literal["psnr", "speed"]
    value: float  # dB, or times as fast


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What was measured, and the choice."""

    verdicts: list[Verdict]
    front: list[Verdict]  # from fast to close: nothing measured is both faster and closer
    chosen: Verdict | None  # None: nothing reaches the target
    refused: dict[str, str]  # contestant -> why it cannot be


def tune(contest: Contest, target: Target, *, caches: Sequence[str] | None = None) -> Tuned:
    """Measures exact choices and presets first, then every cache on top of the fastest choice, and of the fastest
    preset where that is quicker; all of it can be stopped and resumed, since each drawing is kept.

    `caches` are those to try instead of `CACHES`. Raises InputError, before anything is drawn, for one of them that
    this model cannot take; what was not asked for by its name is left out with the reason.
    """
    refused: dict[str, str] = {}
    reference = Contestant(name="exact", role="reference", config=Config(), steps=contest.steps)
    for spelled in caches or ():
        contest.check(replace(reference, name=spelled, config=_with(reference, spelled)))
    contest.run(reference)
    floor = contest.floor(reference)
    plain = _measured(contest, _choices(contest), refused)
    presets = _measured(contest, _presets(contest), refused)
    best = min((reference, *plain), key=contest.seconds)
    bases = {"": best} | {f"{p.name}, ": p for p in _quicker(contest, presets, than=best)}
    cached = [
        replace(base, name=f"{start}{spelled}", role="candidate", config=_with(base, spelled))
        for start, base in bases.items()
        for spelled in caches or CACHES
    ]
    verdicts = judge(contest, reference, [floor, *plain, *presets, *_measured(contest, cached, refused)])
    front = frontier(verdicts)
    return Tuned(verdicts=verdicts, front=front, chosen=choose(front, target), refused=refused)


def _choices(contest: Contest) -> list[Contestant]:
    """Other ways to compute the same, each by itself."""
    configs: dict[str, Config] = {f"attention={name}": Config(attention=name) for name in BACKENDS if name != "native"}
    if contest.pipe.device.type == "cuda":
        configs |= {"graphs=on": Config(graphs="on"), "compile=on": Config(compile="on", fuse="off")}
    return [
        Contestant(name=name, role="candidate", config=config, steps=contest.steps) for name, config in configs.items()
    ]


def _presets(contest: Contest) -> list[Contestant]:
    """The presets beside exact, which is the reference."""
    rows = {name: config for name, config in PRESETS.items() if name != "exact"}
    return [Contestant(name=n, role="candidate", config=config, steps=contest.steps) for n, config in rows.items()]


def _quicker(contest: Contest, presets: Sequence[Contestant], *, than: Contestant) -> list[Contestant]:
    """The fastest preset, where it is faster than `than` by more than a clock's noise."""
    limit = contest.seconds(than) / CLEARLY
    return sorted((p for p in presets if contest.seconds(p) < limit), key=contest.seconds)[:1]


def _with(base: Contestant, spelled: str) -> Config:
    return replace(base.config or Config(), cache=parse(spelled))


def _measured(contest: Contest, contestants: Sequence[Contestant], refused: dict[str, str]) -> list[Contestant]:
    """Those that can run here, run; the reasons of the others go into `refused`."""
    done = []
    for contestant in contestants:
        try:
            contest.run(contestant)
        except (InputError, RuntimeError) as error:
            # A compiler that is missing here, or a kernel that fails, is no reason to measure nothing else.
            known = isinstance(error, InputError)
            refused[contestant.name] = str(error) if known else f"{type(error).__name__}: {first_line(error)}"
            logger.info("%s is left out: %s", contestant.name, refused[contestant.name])
        else:
            done.append(contestant)
    return done


def frontier(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Those that nothing else beats in both speed and PSNR, the fastest first, the reference last."""
    rivals = [v for v in verdicts if v.contestant.role in ("candidate", "reference") and v.speedup is not None]
    front: list[Verdict] = []
    for verdict in sorted(rivals, key=lambda v: (-(v.speedup or 0), -closeness(v))):
        if not front or closeness(verdict) > closeness(front[-1]):
            front.append(verdict)
    return front


def choose(front: Sequence[Verdict], target: Target) -> Verdict | None:
    """The frontier's answer to the target, None where nothing reaches it."""
    if target.kind == "psnr":
        return next((v for v in front if closeness(v) >= target.value), None)
    fast = [v for v in front if (v.speedup or 0) >= target.value]
    return max(fast, key=closeness, default=None)


def closeness(verdict: Verdict) -> float:
    """Mean PSNR to the reference; infinite for the reference itself."""
    values = verdict.distances.get("PSNR")
    return float("inf") if values is None else values.mean().item()


def read_target(*, quality: str | None, speed: str | None) -> Target:
    """`psnr=30` or `2x`. Raises InputError."""
    if quality and speed:
        raise InputError("--target-quality and --target-speed were both given; give one")
    text = speed.lower().removesuffix("x") if speed else (quality or "psnr=30").lower().removeprefix("psnr=")
    try:
        value = float(text)
    except ValueError:
        value = nan
    if not 0 < value < inf:
        raise InputError(
            f"the target {quality or speed!r} is not understood; write --target-quality psnr=30 or --target-speed 2x"
        )
    return Target(kind="speed" if speed else "psnr", value=value)


def as_code(config: Config) -> str:
    """The Config as one writes it, without what is at its default."""
    found: dict[str, Any] = {f.name: getattr(config, f.name) for f in fields(config)}
    said = [
        f"{name}={value!r}" for name, value in found.items() if value != getattr(Config(), name) and name != "cache"
    ]
    cache = [] if config.cache is None else [f"cache={spell(config.cache)!r}"]
    return f"Config({', '.join([*said, *cache])})"
