"""The built-in model on the engine: as it is served when nothing else is named."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from vivace.errors import InputError
from vivace.serve import Engine, Request


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine() as found:
        yield found


def test_only_what_is_masked_is_drawn_anew(engine, pixels):
    drawn = engine.submit(Request(prompt="a red circle on a white background", seed=1, steps=8)).result(240).pictures[0]
    mask = Image.new("L", (256, 256))
    mask.paste(255, (128, 0, 256, 256))
    asked = Request(
        prompt="a blue square on a black background", images=(drawn,), mask=mask, strength=0.9, seed=2, steps=8
    )
    edited = engine.submit(asked).result(240).pictures[0]
    change = abs(pixels(edited) - pixels(drawn)).mean(axis=2)
    kept, painted = change[:, :112].mean(), change[:, 144:].mean()
    # The kept half went through the autoencoder and back, no more.
    assert kept < 6
    assert painted > 5 * kept


def test_a_picture_of_another_shape_is_fitted(engine):
    asked = Request(
        prompt="a red circle", images=(Image.new("RGB", (640, 320), "white"),), strength=0.5, steps=4, seed=1
    )
    assert engine.submit(asked).result(240).pictures[0].size == (256, 128)


def test_a_size_beyond_the_model_is_refused(engine):
    with pytest.raises(InputError, match="longest side of builtin is 256"):
        engine.submit(Request(prompt="a red circle", size=(272, 256)))


def test_a_small_one_is_made(engine):
    found = engine.submit(Request(prompt="a red circle", size=(128, 256), steps=2, seed=1)).result(240).pictures[0]
    assert np.asarray(found).shape == (256, 128, 3)
