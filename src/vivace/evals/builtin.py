"""The built-in model's examination: captions it never saw, drawn, read back, and counted right or wrong."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vivace.builtin import captions as english
from vivace.builtin import world
from vivace.builtin.captions import Said
from vivace.builtin.judge import PARTS, agree, judge
from vivace.builtin.reader import FEATURES, Reader, read
from vivace.builtin.render import render
from vivace.builtin.world import Scenes
from vivace.errors import InputError
from vivace.evals.accuracy import Accuracy, accuracy_by
from vivace.evals.features import extract
from vivace.evals.fid import Moments, fid
from vivace.evals.kid import kid
from vivace.evals.metric import Metric
from vivace.evals.sample import sample

BATCH = 50  # pictures at once
SUBSET = 1000  # pictures of a KID subset; fewer where there are fewer than ten such


@dataclass(frozen=True, kw_only=True)
class Exam:
    """Captions, what each one states, and the scenes they were said of; a third each of one, two and three objects."""

    scenes: Scenes
    captions: tuple[str, ...]
    said: tuple[Said, ...]

    @property
    def counts(self) -> list[str]:
        return [f"{len(said.things)} object{'s' * (len(said.things) > 1)}" for said in self.said]

    @property
    def combinations(self) -> list[str]:
        """Whether a caption holds a colour-shape-relation combination kept from training; one object has none."""
        held = world.holds_out(self.scenes).tolist()
        names = ("2-3 objects, trained combinations", "2-3 objects, held-out combinations")
        return ["1 object" if len(s.things) == 1 else names[h] for s, h in zip(self.said, held, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a model made of an exam, caption by caption, in its order."""

    verdicts: tuple[dict[str, bool], ...]  # by part, and "right" for the whole
    features: torch.Tensor  # [N, 64] float64: the reader's, of the pictures
    seconds: float


def draw_exam(count: int, *, seed: int = 0) -> Exam:
    """`count` captions; the same seed gives the same ones. Raises InputError for fewer than three."""
    if count < 3:
        raise InputError(f"an exam needs at least 3 captions, one for each number of objects, got {count}")
    generator = torch.Generator().manual_seed(seed)
    thirds = []
    for place, shares in enumerate(((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))):
        wanted = count // 3 + (place < count % 3)
        # More than are wanted, since scenes too crowded to place are dropped.
        thirds.append(world.sample(3 * wanted + 50, generator, counts=shares)[:wanted])
    scenes = world.concatenate(thirds)
    rng = random.Random(seed)
    captions, said = zip(*(english.say(row, rng) for row in english.facts(scenes)), strict=True)
    return Exam(scenes=scenes, captions=captions, said=said)


def take(
    exam: Exam,
    pipe: Any,
    reader: Reader,
    *,
    steps: int = 28,
    seed: int = 0,
    on_pictures: Callable[[int], None] | None = None,
    **call: Any,
) -> Answers:
    """Has `pipe` draw every caption (caption i from the noise of seed + i) and the reader read the pictures.

    `call` goes to the pipeline; `on_pictures(done)` is told after every batch.
    """
    parts = []
    for first in range(0, len(exam.captions), BATCH):
        parts.append(take_part(exam, pipe, reader, first=first, count=BATCH, steps=steps, seed=seed, **call))
        if on_pictures:
            on_pictures(first + len(parts[-1].verdicts))
    return join(parts)


def take_part(
    exam: Exam,
    pipe: Any,
    reader: Reader,
    *,
    first: int,
    count: int = BATCH,
    steps: int = 28,
    seed: int = 0,
    **call: Any,
) -> Answers:
    """The same for one batch, of `count` captions from number `first` on."""
    start, device = time.perf_counter(), next(reader.parameters()).device
    chosen = slice(first, first + count)
    pictures = sample(pipe, exam.captions[chosen], steps=steps, seed=seed + first, **call).pictures.to(device)
    verdicts = tuple(map(judge, read(reader, pictures), exam.said[chosen]))
    features = torch.cat(list(extract(reader.features, [pictures])))
    return Answers(verdicts=verdicts, features=features, seconds=time.perf_counter() - start)


def join(parts: Sequence[Answers]) -> Answers:
    """The answers of an exam's batches, in their order, as one."""
    return Answers(
        verdicts=tuple(verdict for part in parts for verdict in part.verdicts),
        features=torch.cat([part.features for part in parts]),
        seconds=sum(part.seconds for part in parts),
    )


def metrics(exam: Exam, answers: Answers, reader: Reader, *, seed: int = 0) -> list[Metric]:
    """The answers as rows: accuracy overall, by number of objects, by combination and by part; FID, KID; the time.

    FID and KID compare the pictures with renders of other scenes, and beside them the renders of the exam's own scenes
    with those: what a perfect model would get. Either is left out where there are too few pictures.
    """
    right = [verdict["right"] for verdict in answers.verdicts]
    rows = [Metric.accuracy("caption accuracy", Accuracy.of(right), of="all")]
    for groups in (exam.counts, exam.combinations):
        by = {name: part for name, part in accuracy_by(groups, right).items() if name not in {row.of for row in rows}}
        rows += [Metric.accuracy("caption accuracy", part, of=name) for name, part in by.items()]
    for part in PARTS:
        share = Accuracy.of([verdict[part] for verdict in answers.verdicts])
        rows.append(Metric.accuracy("part right", share, of=part))
    rows.append(Metric.accuracy("reader right", read_renders(exam, reader), of="renders of the exam's scenes"))
    own, others = rendered(exam, reader), rendered(draw_exam(len(right), seed=seed + 1), reader)
    for of, features in (("pictures", answers.features), ("renders (the floor)", own)):
        rows += distribution(features, others, of=of)
    rows.append(Metric(name="time", of="a picture", value=answers.seconds / len(right), unit="s", count=len(right)))
    return rows


def distribution(features: torch.Tensor, real: torch.Tensor, *, of: str) -> list[Metric]:
    """FID and KID of one set of features beside a real one, as far as there are enough of them.

    KID's kernel was made for features of a size near 1 and cubes any other: it gets these in units of the real ones'
    root mean square.
    """
    count = min(len(features), len(real))
    rows = []
    if count > FEATURES:
        rows.append(Metric(name="FID", of=of, value=fid(Moments.of(features), Moments.of(real)), count=count))
    if count >= 20:
        size = real.square().mean().sqrt()
        found = kid(features / size, real / size, subset_size=min(SUBSET, count // 10))
        reach = 1.96 * found.standard_error
        rows.append(Metric(name="KID", of=of, value=found.value, low=found.value - reach, high=found.value + reach,
                           count=count))  # fmt: skip
    return rows


def rendered(exam: Exam, reader: Reader) -> torch.Tensor:
    """The reader's features [N, 64] of the true renders of an exam's scenes."""
    device = next(reader.parameters()).device
    parts = (exam.scenes[first : first + BATCH].to(device) for first in range(0, len(exam.said), BATCH))
    return torch.cat(list(extract(reader.features, map(render, parts))))


def read_renders(exam: Exam, reader: Reader) -> Accuracy:
    """How often the reader reads a true render entirely right: no accuracy measured with it is surer than this."""
    device = next(reader.parameters()).device
    right: list[bool] = []
    for first in range(0, len(exam.said), BATCH):
        scenes = exam.scenes[first : first + BATCH]
        right += agree(read(reader, render(scenes.to(device))), scenes)
    return Accuracy.of(right)
