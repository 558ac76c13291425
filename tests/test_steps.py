"""Steps told while a stock pipeline runs."""

import pytest

from vivace.families import FAMILIES
from vivace.steps import counted


# PixArt has no callback at the end of a step.
@pytest.mark.parametrize(("family", "extra"), [("sd", {}), ("pixart", {"use_resolution_binning": False})])
def test_every_step_is_told_once(family, extra):
    pipe = FAMILIES[family].tiny()
    told = []
    with counted(pipe, told.append, picture=1, pictures=3) as counter:
        pipe(prompt="a red circle", num_inference_steps=3, output_type="latent", **extra)
    assert [(step.done, step.total, step.picture, step.pictures) for step in told] == [(n, 3, 1, 3) for n in range(4)]
    assert (counter.done, counter.total) == (3, 3)
    assert "progress_bar" not in vars(pipe)


def test_the_bar_comes_back_after_an_error():
    pipe = FAMILIES["sd"].tiny()
    with pytest.raises(ValueError, match="divisible by 8"), counted(pipe, None, picture=0, pictures=1):
        pipe(prompt="a red circle", width=63, height=64, num_inference_steps=1)
    assert "progress_bar" not in vars(pipe)
