"""An exam of a student that ends early leaves what was drawn until then."""

import json
from pathlib import Path

import pytest

import vivace
from vivace.accelerate import acceleration_of
from vivace.config import PRESETS


@pytest.mark.parametrize("preset", [None, "exact"])
def test_each_row_is_written_before_the_next_is_drawn(distill_recipe, tmp_path, monkeypatch, capsys, preset):
    recipe, path, drawn = distill_recipe("examine"), tmp_path / "exam.json", []

    def take(exam, pipe, reader, *, steps, guidance_scale):
        known = json.loads(path.read_text())["rows"] if path.is_file() else []
        drawn.append((len(known), steps, guidance_scale > 1))
        done = acceleration_of(pipe)
        assert (done and done.target.config) == (PRESETS[preset] if preset else None)
        return recipe.Answers(verdicts=({"right": True},) * len(exam.captions), features=None, seconds=3.0)

    monkeypatch.setattr(recipe, "take", take)
    asked = [
        str(Path(vivace.__file__).parent / "builtin" / "model" / "few_step"),
        "--captions",
        "3",
        "--steps",
        "2",
        "1",
        "--solvers",
        "euler",
    ]
    recipe.main([*asked, *(["--preset", preset] if preset else []), "--device", "cpu", "-o", str(path)])
    assert drawn == [(0, 28, True), (1, 4, True), (2, 2, False), (3, 1, False)]
    rows = json.loads(path.read_text())["rows"]
    assert [row["name"] for row in rows] == ["teacher", "teacher, euler", "student, few_step", "student, few_step"]
    assert [row["seconds a picture"] for row in rows] == [1.0] * 4
    # Three pictures are too few for a FID.
    assert "FID" not in rows[0]
    assert capsys.readouterr().out.count("name ") == 4
