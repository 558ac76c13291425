"""Work that is spread: everything is done, also what a worker had when it was killed."""

import os
import signal
from functools import partial
from pathlib import Path

import pytest

from vivace.cluster.spread import spread
from vivace.errors import InputError
from vivace.families import FAMILIES
from vivace.generation import picture
from vivace.generation import spread as spread_out
from vivace.generation.generate import generate
from vivace.generation.job import Job


def squares(folder: str):
    """What makes a task's function: the first to come to task 3 is killed over it."""

    def do(number: int) -> int:
        mark = Path(folder) / "killed"
        if number == 3 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return number * number

    return do


def refuses():
    def do(number: int) -> int:
        raise InputError(f"{number} is refused; take another")

    return do


def test_what_a_killed_worker_had_is_done_again(cluster, tmp_path):
    found = dict(spread(partial(squares, str(tmp_path)), range(6), workers=2))
    assert (tmp_path / "killed").exists()
    assert found == {number: number * number for number in range(6)}


def test_a_mistake_comes_back_as_it_was_raised(cluster):
    with pytest.raises(InputError, match="7 is refused; take another"):
        list(spread(refuses, [7], workers=1))


def test_nothing_to_do_starts_nothing():
    assert list(spread(refuses, [])) == []


def test_a_cluster_of_ones_own_is_reached_from_this_machine_only(cluster):
    import psutil
    import ray

    assert {node["NodeManagerAddress"] for node in ray.nodes()} == {"127.0.0.1"}
    mine = [psutil.Process(), *psutil.Process().children(recursive=True)]
    ours = {process.pid for process in mine if "ray" in " ".join(process.cmdline()) or process.pid == os.getpid()}
    listening = [one for one in psutil.net_connections("inet") if one.status == psutil.CONN_LISTEN and one.pid in ours]
    assert listening
    assert {one.laddr.ip for one in listening} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert os.environ["RAY_AUTH_MODE"] == "token"


def test_pictures_are_those_of_one_process_and_are_made_once(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    FAMILIES["sd3"].tiny().save_pretrained("tiny")
    job = Job(model="tiny", prompts=("one", "two", "three"), steps=2, size=(64, 64), seed=5, output=Path("a/out.png"))
    Path("a").mkdir()
    Path("b").mkdir()
    made = spread_out.generate(job, workers=2).made
    assert [one.path.name for one in made] == ["out-1.png", "out-2.png", "out-3.png"]
    alone = generate(Job(**{**vars(job), "output": Path("b/out.png")})).made
    for one, other in zip(made, alone, strict=True):
        assert picture.read(one.path).tobytes() == picture.read(other.path).tobytes()
        assert picture.facts(one.path)["prompt"] == one.prompt
    Path("a/out-2.png").unlink()
    times = {name: Path("a", name).stat().st_mtime_ns for name in ("out-1.png", "out-3.png")}
    again = spread_out.generate(job, workers=1)
    assert [one.seconds > 0 for one in again.made] == [False, True, False]
    assert times == {name: Path("a", name).stat().st_mtime_ns for name in times}
    kept = spread_out.generate(job)
    assert (kept.steps, kept.size, [one.seconds for one in kept.made]) == (2, (64, 64), [0.0, 0.0, 0.0])
    with pytest.raises(InputError, match=r"out-1.png exists and was made with another num_inference_steps"):
        spread_out.generate(Job(**{**vars(job), "steps": 3}))
    with pytest.raises(InputError, match="another prompt"):
        spread_out.generate(Job(**{**vars(job), "prompts": ("four", "two", "three")}))
