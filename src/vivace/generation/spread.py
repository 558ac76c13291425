"""A picture job spread over a cluster's workers: what is on disk already is kept, and the rest is drawn."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from vivace.cluster.spread import spread
from vivace.errors import InputError
from vivace.generation import picture, video
from vivace.generation.generate import CALL, Drawn, Made, Result, asked, draw_seed, open_job, plan_of, prepare
from vivace.generation.job import Job
from vivace.steps import Step

MACHINES = frozenset({"scheduler", "dtype", "device", "vivace"})  # settings that are known once a model is loaded
SAID = 3  # differences that an error names


@dataclass(frozen=True, kw_only=True)
class Task:
    """One picture to draw."""

    index: int
    prompt: str
    seed: int

    def __str__(self) -> str:
        return f"{self.prompt[:60]!r} (seed {self.seed})"


@dataclass(frozen=True, kw_only=True)
class Sent:
    """A picture as a worker sends it: the file itself, so that no folder has to be shared."""

    content: bytes
    drawn: Drawn
    applied: Mapping[str, Any]


def generate(job: Job, *, workers: int | None = None, on_step: Callable[[Step], None] | None = None) -> Result:
    """Make and write what `job` asks for on the connected cluster; run again it makes what is missing.

    A file counts as made when it carries the same prompt, settings and fingerprints of the model and of every file that
    the job names, and the same seed where the job names one; any other is an error that says what differs. Everything
    that can be checked is checked first. Raises InputError, and what was written by then stays.
    """
    began = time.perf_counter()
    # That a file exists is no mistake here, as long as it is one of this job's.
    ready = prepare(replace(job, overwrite=True))
    expected = json.loads(json.dumps(asked(ready)))
    seeds = plan_of(job, seed=draw_seed() if job.seed is None else job.seed)
    made: dict[int, Made] = {}
    for index, ((prompt, seed), path) in enumerate(zip(seeds, ready.paths, strict=True)):
        if path.exists() and not job.overwrite:
            wanted = {"prompt": prompt, **({} if job.seed is None else {"seed": seed})}
            made[index] = _kept(path, wanted, expected)
    missing = [Task(index=i, prompt=text, seed=seed) for i, (text, seed) in enumerate(seeds) if i not in made]
    last: Sent | None = None
    for task, sent in spread(partial(_drawer, job, ready.paths[0].suffix), missing, workers=workers):
        if other := differences(json.loads(json.dumps(sent.applied)), expected):
            raise InputError(
                f"a worker drew with another {other[0]}; every machine needs the same files under the same paths"
            )
        with picture.whole(ready.paths[task.index]) as part:
            part.write_bytes(sent.content)
        made[task.index] = replace(sent.drawn.made, path=ready.paths[task.index])
        last = sent
        if on_step:
            on_step(Step(done=1, total=1, picture=len(made) - 1, pictures=len(seeds)))
    seconds = {"generate_s": sum(one.seconds for one in made.values()), "total_s": time.perf_counter() - began}
    return Result(
        made=tuple(made[index] for index in range(len(seeds))),
        **_shape(last, ready.paths[-1]),
        cache={},
        timings={name: round(value, 3) for name, value in seconds.items()},
        report=None,
    )


def _shape(last: Sent | None, path: Path) -> dict[str, Any]:
    """How the last picture was drawn; where none was, what a file says of itself."""
    if last is not None:
        drawn = last.drawn
        return {"steps": drawn.steps, "size": drawn.size, "frames": drawn.frames, "applied": last.applied}
    found = _facts(path)
    steps = found["settings"].get(CALL["steps"], 0)
    frames = found.get("frames", 1)
    return {"steps": steps, "size": tuple(found["size"]), "frames": frames, "applied": found["settings"]}


def _drawer(job: Job, suffix: str) -> Callable[[Task], Sent]:
    """In a worker: the job's model, loaded once, and what draws one picture with it."""
    with tempfile.TemporaryDirectory(prefix="vivace-") as folder:
        opened = open_job(replace(job, output=Path(folder, f"out{suffix}"), overwrite=True))

    def draw(task: Task) -> Sent:
        # A folder for this picture alone: a worker's end comes without a word.
        with tempfile.TemporaryDirectory(prefix="vivace-") as folder:
            path = Path(folder, f"{task.index}{suffix}")
            drawn = opened.draw(task.prompt, path, seed=task.seed)
            return Sent(content=path.read_bytes(), drawn=drawn, applied=opened.applied)

    return draw


def _kept(path: Path, wanted: Mapping[str, Any], expected: Mapping[str, Any]) -> Made:
    """A file that is there, where this job would make the very same. Raises InputError where it is another."""
    found = _facts(path)
    other = [_told(name, found[name], value) for name, value in wanted.items() if found[name] != value]
    other += differences(found["settings"], expected)
    if other:
        raise InputError(
            f"{path} exists and was made with another {', '.join(other[:SAID])}; give --overwrite to replace it, or "
            "another -o"
        )
    return Made(path=path, prompt=found["prompt"], seed=found["seed"], seconds=0.0)


def differences(settings: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Where a picture's settings are not what is asked for now, each with the value then and now.

    What only the machine that draws can know, and what Vivace's version, is no difference.
    """
    found = []
    for name in sorted((settings.keys() | expected.keys()) - MACHINES):
        then, now = settings.get(name), expected.get(name)
        if then != now and isinstance(then, Mapping) and isinstance(now, Mapping):
            inner = sorted(then.keys() | now.keys())
            found += [
                _told(f"{name} {one}", then.get(one), now.get(one)) for one in inner if then.get(one) != now.get(one)
            ]
        elif then != now:
            found.append(_told(name, then, now))
    return found


def _told(name: str, then: Any, now: Any) -> str:
    short = ["none" if value is None else f"{value!r}"[:60] for value in (then, now)]
    return f"{name} ({short[0]}, now {short[1]})"


def _facts(path: Path) -> dict[str, Any]:
    return (video if path.suffix.lower() == ".mp4" else picture).facts(path)
