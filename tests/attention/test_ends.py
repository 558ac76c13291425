"""The first and last steps of a request keep to 16 bit; a recording is of one kind or the other."""

from types import SimpleNamespace

import pytest
import torch

import vivace
from vivace import InputError, request
from vivace.attention import BACKENDS
from vivace.attention.backend import Backend
from vivace.attention.ends import Ends
from vivace.attention.native import NATIVE


@pytest.fixture
def coarse(monkeypatch):
    """A backend that is far from exact, and counts its calls."""
    calls = []

    def attend(q, k, v, *, mask=None, scale=None):
        now = request.current()
        calls.append(now and now.step)
        return NATIVE.attend(q, k, v, mask=mask, scale=scale).mul(1.5)

    backend = Backend(
        name="coarse", attend=attend, exact=False, masks=True,
        devices=NATIVE.devices, dtypes=NATIVE.dtypes, leaves="nothing",
    )  # fmt: skip
    module = SimpleNamespace(COARSE=backend)
    monkeypatch.setitem(__import__("sys").modules, "coarse_backend", module)
    monkeypatch.setitem(BACKENDS, "coarse", "coarse_backend:COARSE")
    return calls


@pytest.mark.parametrize(("ends", "expected"), [(0, {0, 1, 2}), (1, {1}), (2, set())])
@pytest.mark.parametrize("fuse", ["auto", "off"])
def test_which_steps(sd3_pipe, sd3_latents, coarse, ends, expected, fuse):
    vivace.accelerate(sd3_pipe, attention="coarse", exact_ends=ends, fuse=fuse)
    sd3_latents(sd3_pipe)
    assert set(coarse) == expected
    line = next(note.detail for note in vivace.report(sd3_pipe).passes if note.name == "attention")
    assert "not exact" in line
    assert (f"native in the first and last {ends} steps" in line) == (ends > 0)


def test_all_steps_exact_is_exact(sd3_pipe, sd3_latents, coarse):
    stock = sd3_latents(sd3_pipe)
    vivace.accelerate(sd3_pipe, attention="coarse", exact_ends=2, fuse="off")
    assert torch.equal(sd3_latents(sd3_pipe), stock)
    vivace.accelerate(sd3_pipe, attention="coarse", exact_ends=1, fuse="off")
    assert not torch.allclose(sd3_latents(sd3_pipe), stock, atol=1e-2)


def test_where_a_request_stands():
    scheduler = SimpleNamespace(timesteps=torch.arange(10), begin_index=6)
    now = request.Request(scheduler=scheduler)
    assert now.steps == 4
    ends = []
    for step in range(4):
        now.step = step
        ends.append(Ends(1).hold(now))
        assert Ends(0, share=0.3).hold(now) == (step < 2), "a share is rounded up"
    assert ends == [True, False, False, True]
    assert not Ends(3).hold(None)
    with request.keeping(True):
        assert Ends(3).hold(None), "outside a request its caller says"
        assert not Ends(1).hold(request.Request(step=5)), "and in one its step"
    assert Ends(1).hold(request.Request())
    assert not Ends(1).hold(request.Request(step=5))


def test_refused_where_nothing_counts_steps(sd3_pipe, coarse):
    with pytest.raises(InputError, match="bare denoiser"):
        vivace.accelerate(sd3_pipe.transformer, attention="coarse", exact_ends=1)


@pytest.mark.parametrize("value", [-1, 1.5, True, "2"])
def test_a_number_of_steps(value):
    with pytest.raises(InputError, match="exact_ends is a whole number"):
        vivace.Config(exact_ends=value)
