"""How far an output is from the exact one, beside a noise floor and beside what fewer steps would have cost.

Two correct runs of one pipeline differ: another dtype, batch or order rounds differently, and sampling amplifies
it. A distance means something only beside that floor, and a speed-up only beside the oldest one, taking fewer steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from vivace.errors import InputError
from vivace.evals.metric import Metric
from vivace.evals.pairwise import psnr, relative_error, ssim
from vivace.evals.sample import Output

Draw = Callable[[], Output]
Role = Literal["floor", "candidate", "fewer steps"]


@dataclass(frozen=True, kw_only=True)
class Distance:
    """How far one run is from the exact one, and how long it took."""

    role: Role
    name: str
    latent_error: torch.Tensor  # [B] ||a - b|| / ||b||
    psnr: torch.Tensor  # [B] dB
    ssim: torch.Tensor  # [B]
    seconds: float

    @property
    def metrics(self) -> list[Metric]:
        of = f"{self.role}: {self.name}"
        return [
            Metric.mean("latent relative error", self.latent_error, better="lower", of=of),
            Metric.mean("PSNR", self.psnr, better="higher", of=of, unit="dB"),
            Metric.mean("SSIM", self.ssim, better="higher", of=of),
            Metric(name="time", of=of, value=self.seconds, unit="s"),
        ]


@dataclass(frozen=True, kw_only=True)
class RunComparison:
    """Every run's distance from the exact one, in the order they were run."""

    exact_seconds: float
    distances: tuple[Distance, ...]

    def role(self, role: Role) -> dict[str, Distance]:
        """The distances of one role by name."""
        return {distance.name: distance for distance in self.distances if distance.role == role}

    @property
    def floor(self) -> float:
        """The mean latent error of the floor's noisiest way: below it a candidate is as exact as exact gets."""
        return max(distance.latent_error.mean().item() for distance in self.role("floor").values())

    def times_floor(self, candidate: str) -> float:
        """A candidate's mean latent error in units of the floor; infinite where the floor is 0 and it is not."""
        error = self.role("candidate")[candidate].latent_error.mean().item()
        return error / self.floor if self.floor else float("inf") if error else 0.0

    def steps_as_good(self, candidate: str) -> int | None:
        """The fewest steps tried that come as close to the exact output as the candidate; None where none did.

        A candidate that takes longer than these steps do has bought nothing.
        """
        error = self.role("candidate")[candidate].latent_error.mean()
        good = [int(n) for n, distance in self.role("fewer steps").items() if distance.latent_error.mean() <= error]
        return min(good, default=None)

    @property
    def metrics(self) -> list[Metric]:
        """All of it as rows."""
        exact = Metric(name="time", of="exact", value=self.exact_seconds, unit="s")
        return [exact, *(metric for distance in self.distances for metric in distance.metrics)]


def compare_runs(
    exact: Draw,
    *,
    floors: Mapping[str, Draw],
    candidates: Mapping[str, Draw],
    fewer: Mapping[int, Draw] | None = None,
) -> RunComparison:
    """Runs everything once on the same prompts and seeds and measures its distance from what `exact` gives.

    `floors` are other ways to run the exact maths ({"float32": ..., "one at a time": ...}), `candidates` what is to
    be judged, `fewer` the exact pipeline at smaller step counts (see `fewer_steps`). With `sample`:

        draw = partial(sample, pipe, prompts, steps=28)
        compare_runs(draw, floors={"one at a time": partial(draw, batch=1)}, candidates={"fast": fast},
                     fewer=fewer_steps(draw, steps=(20, 14, 10)))

    Times are wall seconds of one run each, the first one's start-up included: an orientation, no benchmark.
    Raises InputError without a floor, or where outputs differ in shape.
    """
    if not floors:
        raise InputError(
            "a distance needs a noise floor beside it, got no floors; "
            'give at least one other way to run the exact maths, e.g. {"one at a time": partial(draw, batch=1)}'
        )
    reference, exact_seconds = _timed(exact)
    runs: list[tuple[Role, str, Draw]] = [
        *(("floor", name, draw) for name, draw in floors.items()),
        *(("candidate", name, draw) for name, draw in candidates.items()),
        *(("fewer steps", str(steps), draw) for steps, draw in (fewer or {}).items()),
    ]
    return RunComparison(
        exact_seconds=exact_seconds,
        distances=tuple(_distance(role, name, draw, reference) for role, name, draw in runs),
    )


def fewer_steps(draw: Callable[..., Output], *, steps: Sequence[int]) -> dict[int, Draw]:
    """`draw` at each of `steps`, for `compare_runs`; it must take `steps=` as a keyword."""
    return {count: lambda count=count: draw(steps=count) for count in steps}


def _distance(role: Role, name: str, draw: Draw, reference: Output) -> Distance:
    output, seconds = _timed(draw)
    return Distance(
        role=role,
        name=name,
        latent_error=relative_error(output.latents, reference.latents),
        psnr=psnr(output.pictures, reference.pictures),
        ssim=ssim(output.pictures, reference.pictures),
        seconds=seconds,
    )


def _timed(draw: Draw) -> tuple[Output, float]:
    start = time.perf_counter()
    output = draw()
    return output, time.perf_counter() - start
