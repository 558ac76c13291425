"""The pictures of the styles: each command draws the columns that its committed picture shows."""

from pathlib import Path

import pytest
from PIL import Image

from vivace.evals.sheet import CELL, GAP, HEAD, MARGIN

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(("name", "few_step"), [("lora.png", False), ("lora-few-step.png", True)])
def test_the_committed_picture_has_the_columns_that_are_drawn(recipe, name, few_step):
    style = recipe("style")
    columns = style.columns(few_step=few_step)
    with Image.open(DOCS / name) as picture:
        width, height = picture.size
    assert width == MARGIN + (CELL + GAP) * len(columns)
    assert height == HEAD + (CELL + GAP) * len(style.PROMPTS)
    assert {styles for _, styles in columns.values()} == {(), ("inked",), ("framed",), ("inked", "framed")}
    assert any("4 steps" in column for column in columns) == few_step
