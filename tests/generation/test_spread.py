"""A picture job over a cluster's workers: the same pictures as one process makes, and none twice."""

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from vivace.errors import InputError
from vivace.families import FAMILIES
from vivace.generation import picture, spread
from vivace.generation.generate import generate
from vivace.generation.job import Job

pytestmark = pytest.mark.timeout(600)  # clusters start slowly on a busy machine


def test_pictures_are_those_of_one_process_and_are_made_once(cluster, tmp_path, monkeypatch, mortal):
    """Though a worker is killed over one of them."""
    monkeypatch.chdir(tmp_path)
    FAMILIES["sd3"].tiny().save_pretrained("tiny")
    job = Job(model="tiny", prompts=("one", "two", "three"), steps=2, size=(64, 64), seed=5, output=Path("a/out.png"))
    Path("a").mkdir()
    Path("b").mkdir()
    alone = generate(Job(**{**vars(job), "output": Path("b/out.png")})).made
    shutil.copy("b/out-1.png", "a/out-1.png")
    before = Path("a/out-1.png").stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(spread, "_drawer", mortal(spread._drawer, chosen=lambda task: task.index == 1))
        made = spread.generate(job, workers=2).made
    assert mortal.killed()
    assert [one.path.name for one in made] == ["out-1.png", "out-2.png", "out-3.png"]
    assert [one.seconds > 0 for one in made] == [False, True, True]
    assert Path("a/out-1.png").stat().st_mtime_ns == before
    for one, other in zip(made, alone, strict=True):
        assert picture.read(one.path).tobytes() == picture.read(other.path).tobytes()
        assert picture.facts(one.path)["prompt"] == one.prompt
    kept = spread.generate(job)
    assert (kept.steps, kept.size, [one.seconds for one in kept.made]) == (2, (64, 64), [0.0, 0.0, 0.0])
    with pytest.raises(InputError, match=r"out-1.png exists and was made with another num_inference_steps"):
        spread.generate(Job(**{**vars(job), "steps": 3}))
    with pytest.raises(InputError, match="another prompt"):
        spread.generate(Job(**{**vars(job), "prompts": ("four", "two", "three")}))


def test_a_worker_leaves_nothing_on_its_disk(tmp_path, monkeypatch):
    """It is ended without being asked."""
    FAMILIES["sd3"].tiny().save_pretrained(tmp_path / "tiny")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    job = Job(model=str(tmp_path / "tiny"), prompts=("one",), steps=1, size=(64, 64), output=tmp_path / "out.png")
    draw = spread._drawer(job, ".png")
    sent = draw(spread.Task(index=0, prompt="one", seed=1))
    assert sent.content.startswith(b"\x89PNG")
    assert list((tmp_path / "temporary").iterdir()) == []


BASE = {"model": "a", "num_inference_steps": 2, "contents": {"a": "1", "cat.png": "2"}, "vivace": "0.1"}


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({"vivace": "0.2", "dtype": "bfloat16"}, []),
        ({"num_inference_steps": 3}, ["num_inference_steps (2, now 3)"]),
        ({"lora": ["x:1"]}, ["lora (none, now ['x:1'])"]),
        ({"contents": {"a": "1", "cat.png": "3"}}, ["contents cat.png ('2', now '3')"]),
    ],
)
def test_what_differs_is_named_whichever_side_has_it(now, said):
    assert spread.differences(BASE, BASE | now) == said
    assert len(spread.differences(BASE | now, BASE)) == len(said)


def test_a_file_that_changed_under_its_name_is_a_change(tmp_path, monkeypatch):
    """Before a worker is started: nothing of what is there is drawn again."""
    monkeypatch.chdir(tmp_path)
    FAMILIES["sd3"].tiny().save_pretrained("tiny")
    shape = {"model": "tiny", "steps": 4, "strength": 0.5, "seed": 5, "images": (Path("cat.png"),)}
    job = Job(prompts=("one",), output=Path("out.png"), **shape)
    Image.new("RGB", (64, 64), "red").save("cat.png")
    generate(job)
    assert spread.generate(job).made[0].seconds == 0.0
    Image.new("RGB", (64, 64), "blue").save("cat.png")
    with pytest.raises(InputError, match=r"out.png exists and was made with another contents cat.png \("):
        spread.generate(job)
    Image.new("RGB", (64, 64), "red").save("cat.png")
    with pytest.raises(InputError, match=r"another given scheduler|another given \(none"):
        spread.generate(replace(job, scheduler="heun"))
    weights = next(Path("tiny/transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(InputError, match="another contents tiny"):
        spread.generate(job)
