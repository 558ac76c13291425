"""`vivace info` reads back what a picture carries."""

import json

import pytest
from PIL import Image

from vivace import cli
from vivace.generation import picture


def info(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(["info", *map(str, arguments)])
    return end.value.code


def test_everything_a_picture_carries(tmp_path, capsys):
    path = tmp_path / "out.png"
    picture.write(Image.new("RGB", (16, 8)), path, prompt="a red circle", seed=7, settings={"scheduler": "Euler"})
    assert info(path) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines == {"path": str(path), "prompt": "a red circle", "seed": "7", "size": "16x8", "scheduler": "Euler"}
    assert info(path, "--json") == 0
    assert json.loads(capsys.readouterr().out)["settings"] == {"scheduler": "Euler"}


def test_a_name_that_no_file_has(capsys):
    assert info("x" * 300 + ".png") == 2
    assert "no picture" in capsys.readouterr().err
    assert info("x" * 300 + ".mp4") == 2
    said = capsys.readouterr().err
    assert "does not say how it was made" in said
    assert said.count("\n") == 1


def test_a_foreign_picture(tmp_path, capsys):
    Image.new("RGB", (16, 8)).save(tmp_path / "plain.png")
    assert info(tmp_path / "plain.png") == 2
    assert "does not say how it was made" in capsys.readouterr().err
