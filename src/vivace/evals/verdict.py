"""How far every contestant's drawings are from the reference's, beside the time they took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from vivace.evals.contest import Contest, Contestant, steps_within
from vivace.evals.instruments import Instruments
from vivace.evals.metric import Metric
from vivace.evals.pairwise import psnr, relative_error, ssim
from vivace.evals.store import Drawn


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One contestant beside the reference; distances and scores are per prompt."""

    contestant: Contestant
    seconds: float | None  # a picture, median; None: drawn together with others
    speedup: float | None  # over the reference
    computed: float | None  # share of denoiser calls
    peak_bytes: int | None
    distances: Mapping[str, torch.Tensor]  # instrument -> [N]: from the reference, whose own are not there; scores
    dataset: Sequence[Metric] = ()  # of all its pictures together, from real ones
    wins: str = ""  # of a candidate: which controls it beats at equal time

    @property
    def metrics(self) -> list[Metric]:
        """Rows with the mean, the worst and the 5th percentile."""
        of = f"{self.contestant.role}: {self.contestant.name}"
        rows = [
            Metric.mean(name, values, better=BETTER.get(name, "lower"), of=of, unit=UNITS.get(name, ""))
            for name, values in self.distances.items()
        ]
        times = [] if self.seconds is None else [Metric(name="time", of=of, value=self.seconds, unit="s")]
        return [*rows, *self.dataset, *times]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        plain = {name: getattr(self, name) for name in ("seconds", "speedup", "computed", "peak_bytes", "wins")}
        contestant = {**asdict(self.contestant), "config": repr(self.contestant.config)}
        return {**contestant, **plain, "metrics": [metric.to_dict() for metric in self.metrics]}


BETTER: dict[str, Any] = {"PSNR": "higher", "SSIM": "higher", "CLIP score": "higher"}
UNITS = {"PSNR": "dB"}


def judge(
    contest: Contest,
    reference: Contestant,
    others: Sequence[Contestant],
    *,
    instruments: Instruments | None = None,
) -> list[Verdict]:
    """The verdict on every contestant, the reference first. `instruments` are further ones than PSNR and SSIM."""
    instruments = instruments or Instruments()
    whole = contest.seconds(reference)
    verdicts = []
    for one in (reference, *others):
        values = _values(contest, one, None if one is reference else reference, instruments)
        verdicts.append(_verdict(contest, one, values, whole=whole, instruments=instruments))
    return [_with_wins(verdict, verdicts) for verdict in verdicts]


def _values(
    contest: Contest, one: Contestant, reference: Contestant | None, instruments: Instruments
) -> dict[str, torch.Tensor]:
    """Instrument -> one value a prompt; a video's is the mean over its frames."""
    found: dict[str, list[torch.Tensor]] = {}
    for index, prompt in enumerate(contest.prompts):
        ours = contest.store.drawn(one.name, index)
        values = _distances(ours, contest.store.drawn(reference.name, index), instruments) if reference else {}
        captions = [prompt] * len(ours.frames)
        values |= {name: measure(ours.frames, captions) for name, measure in instruments.captioned.items()}
        for name, value in values.items():
            found.setdefault(name, []).append(value.double().mean())
    return {name: torch.stack(values) for name, values in found.items()}


def _distances(ours: Drawn, exact: Drawn, instruments: Instruments) -> dict[str, torch.Tensor]:
    """Instrument -> one value a frame."""
    values = {
        "latent relative error": relative_error(ours.latents[None], exact.latents[None]),
        "PSNR": psnr(ours.frames, exact.frames),
        "SSIM": ssim(ours.frames, exact.frames),
        **{name: measure(ours.frames, exact.frames) for name, measure in instruments.paired.items()},
    }
    if len(ours.frames) > 1:
        values["temporal error"] = temporal_error(ours, exact)
    return values


def temporal_error(ours: Drawn, exact: Drawn) -> torch.Tensor:
    """How differently a video changes from frame to frame: ||d - d'|| / ||d'|| of the differences of frames, [1].

    A flicker that no single frame shows stands out here. A reference that stands still counts as one that moves by one
    level of its 8 bits, so that there is a number for it.
    """
    moved, reference = (x.frames.double().diff(dim=0).flatten() for x in (ours, exact))
    return ((moved - reference).norm() / reference.norm().clamp(min=len(reference) ** 0.5 / 255))[None]


def _verdict(
    contest: Contest,
    contestant: Contestant,
    distances: Mapping[str, torch.Tensor],
    *,
    whole: float,
    instruments: Instruments,
) -> Verdict:
    records = contest.of(contestant)
    shares = [record.computed for record in records if record.computed is not None]
    peaks = [record.peak_bytes for record in records if record.peak_bytes is not None]
    seconds = None if contestant.batch > 1 else contest.seconds(contestant)
    pictures = (contest.store.drawn(contestant.name, index).frames for index in range(len(contest.prompts)))
    of = f"{contestant.role}: {contestant.name}"
    return Verdict(
        contestant=contestant,
        seconds=seconds,
        speedup=whole / seconds if seconds else None,
        computed=sum(shares) / len(shares) if shares else None,
        peak_bytes=max(peaks, default=None),
        distances=distances,
        dataset=instruments.dataset.measure(pictures, of=of) if instruments.dataset else (),
    )


def _with_wins(verdict: Verdict, verdicts: Sequence[Verdict]) -> Verdict:
    """A candidate beside its controls: what the reference and other solvers reach with as many steps as it has time."""
    if verdict.contestant.role != "candidate" or not verdict.speedup:
        return verdict
    steps = steps_within(1 / verdict.speedup, of=verdicts[0].contestant.steps)
    if steps >= verdicts[0].contestant.steps:
        return replace(verdict, wins="saves less than a step")
    mine = verdict.distances["PSNR"].mean().item()
    rivals = [v for v in verdicts if v.contestant.role == "control" and v.contestant.steps <= steps]
    better = [v.contestant.name for v in rivals if v.distances["PSNR"].mean().item() >= mine]
    if not rivals:
        return replace(verdict, wins="no control was drawn")
    return replace(verdict, wins=f"loses to {', '.join(better)}" if better else "beats every control")
