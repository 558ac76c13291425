"""A picture job over a cluster's workers: the same pictures as one process makes, and none twice."""

from pathlib import Path

import pytest

from vivace.errors import InputError
from vivace.families import FAMILIES
from vivace.generation import picture, spread
from vivace.generation.generate import generate
from vivace.generation.job import Job

pytestmark = pytest.mark.timeout(600)  # clusters start slowly on a busy machine


def test_pictures_are_those_of_one_process_and_are_made_once(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    FAMILIES["sd3"].tiny().save_pretrained("tiny")
    job = Job(model="tiny", prompts=("one", "two", "three"), steps=2, size=(64, 64), seed=5, output=Path("a/out.png"))
    Path("a").mkdir()
    Path("b").mkdir()
    made = spread.generate(job, workers=2).made
    assert [one.path.name for one in made] == ["out-1.png", "out-2.png", "out-3.png"]
    alone = generate(Job(**{**vars(job), "output": Path("b/out.png")})).made
    for one, other in zip(made, alone, strict=True):
        assert picture.read(one.path).tobytes() == picture.read(other.path).tobytes()
        assert picture.facts(one.path)["prompt"] == one.prompt
    Path("a/out-2.png").unlink()
    times = {name: Path("a", name).stat().st_mtime_ns for name in ("out-1.png", "out-3.png")}
    again = spread.generate(job, workers=1)
    assert [one.seconds > 0 for one in again.made] == [False, True, False]
    assert times == {name: Path("a", name).stat().st_mtime_ns for name in times}
    kept = spread.generate(job)
    assert (kept.steps, kept.size, [one.seconds for one in kept.made]) == (2, (64, 64), [0.0, 0.0, 0.0])
    with pytest.raises(InputError, match=r"out-1.png exists and was made with another num_inference_steps"):
        spread.generate(Job(**{**vars(job), "steps": 3}))
    with pytest.raises(InputError, match="another prompt"):
        spread.generate(Job(**{**vars(job), "prompts": ("four", "two", "three")}))
