"""What `vivace calibrate` found out about a model: a small JSON file, checked when it is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vivace.errors import InputError
from vivace.fingerprint import fingerprint as contents

if TYPE_CHECKING:
    from vivace.cache.policy import Policy
    from vivace.passes.target import Target

SHIPPED = Path(__file__).parent / "calibrations"
"""Calibrations of models that come with the package."""


TOLERANCE = 0.1
"""Of the whole range of time, by which a step may stand elsewhere than where it was calibrated."""


NODES = 3
"""Computed outputs, at most, that an estimated one is the sum of."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which of `steps` steps are computed, and of what sum of the last computed outputs the others are."""

    steps: int
    scheduler: str  # class name
    compute: tuple[int, ...]
    weights: Mapping[int, tuple[float, ...]]  # of every other step: of the last computed outputs, the newest last
    times: tuple[float, ...] = ()  # of every step, as the scheduler counted; empty: not told

    def __post_init__(self) -> None:
        if self.compute[:1] != (0,) or {*self.compute, *self.weights} != {*range(self.steps)}:
            raise ValueError("a plan computes its first step, and has weights for every step that it does not compute")
        if any(not 0 < len(factors) <= min(NODES, len(self.nodes(step))) for step, factors in self.weights.items()):
            raise ValueError(f"weights are of at most {NODES} outputs that were computed before")

    def nodes(self, step: int) -> tuple[int, ...]:
        """The computed steps that the estimate of `step` may go by, newest last."""
        return tuple(one for one in self.compute if one < step)[-NODES:]

    def factors(self, step: int, *, since: int) -> tuple[float, ...]:
        """Of what sum of the last computed outputs that of `step` is, where nothing from before step `since` is known.

        With too little known (image to image has just begun) it is the newest.
        """
        return self.weights[step] if self.nodes(step)[0] >= since else (1.0,)

    def fits(self, *, steps: int, scheduler: str, times: Sequence[float]) -> bool:
        """Whether it was made for such a run; `times` are those of its last steps (image to image starts late).

        Another shift of the noise schedule puts other noise at the same step, and the plan would be of no worth.
        """
        if (self.steps, self.scheduler) != (steps, scheduler):
            return False
        own = self.times[len(self.times) - len(times) :] if self.times else times
        allowed = TOLERANCE * max(map(abs, (*own, *times)))
        return all(abs(a - b) <= allowed for a, b in zip(own, times, strict=True))


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """One model's calibrations; a part is absent where it was no better than a constant."""

    denoiser: str  # class name and fingerprint
    plans: tuple[Plan, ...] = ()
    teacache: tuple[float, ...] | None = None
    firstblock: Mapping[int, float] = field(default_factory=dict)  # computed steps of 100 -> threshold


def read(path: Path) -> Calibration:
    """The calibration in a file. Raises InputError for what is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        plans = tuple(
            Plan(
                steps=int(row["steps"]),
                scheduler=str(row["scheduler"]),
                compute=tuple(map(int, row["compute"])),
                weights={int(step): tuple(map(float, factors)) for step, factors in row["weights"].items()},
                times=tuple(map(float, row.get("times", ()))),
            )
            for row in found.get("planned", ())
        )
        polynomial = found.get("teacache")
        thresholds = {int(row["computed_percent"]): float(row["threshold"]) for row in found.get("firstblock", ())}
        return Calibration(
            denoiser=str(found["denoiser"]),
            plans=plans,
            teacache=tuple(map(float, polynomial["coefficients"])) if polynomial else None,
            firstblock=thresholds,
        )
    except OSError as error:
        raise InputError(
            f"cannot read the calibration {path}: {error.strerror}; write one with vivace calibrate"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no calibration ({error}); write one with vivace calibrate") from error


def calibration_of(target: Target, *, file: str | None) -> Calibration | None:
    """The calibration in `file`, else what ships for this model, else None.

    A file is of one scheduler and number of steps; of those that ship the plans are put together. Raises InputError
    where the file is another model's.
    """
    own = {fingerprint(denoiser) for denoiser in target.denoisers.values()}
    if file is None:
        shipped = [one for one in _shipped() if one.denoiser in own]
        return replace(shipped[0], plans=tuple(plan for one in shipped for plan in one.plans)) if shipped else None
    found = read(Path(file).expanduser())
    if found.denoiser not in own:
        raise InputError(f"{file} was calibrated for {found.denoiser}, this model is {', '.join(sorted(own))}")
    return found


def digest_of(policy: Policy) -> str:
    """A digest of the calibration that a policy reads; empty for one that reads none, and where it is missing."""
    if not hasattr(policy, "file"):
        return ""
    named = getattr(policy, "file", None)
    path = Path(named).expanduser() if named else SHIPPED
    return contents(path) if path.exists() else ""


def fingerprint(denoiser: Any) -> str:
    """A denoiser's class and a digest of its configuration: models tuned from one another share it."""
    config = {name: value for name, value in sorted(denoiser.config.items()) if not name.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()
    return f"{type(denoiser).__name__}-{digest[:12]}"


def _shipped() -> Iterator[Calibration]:
    return (read(path) for path in sorted(SHIPPED.glob("*.json")))
