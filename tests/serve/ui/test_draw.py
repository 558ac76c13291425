"""Pictures and comparisons as the page follows them, without a browser."""

from __future__ import annotations

import asyncio
import base64
import io

import pytest
from PIL import Image

from vivace.families import FAMILIES
from vivace.serve.ui.compare import Way, compare, difference
from vivace.serve.ui.draw import Studio
from vivace.serve.ui.form import Form
from vivace.serve.ui.inputs import Inputs

FIELDS = {
    "prompt": "a red circle", "negative": "", "model": "tiny", "size": "64x64", "steps": 4, "guidance": 4.0,
    "seed": "3", "preset": "exact", "cache": "none", "lora": [], "strength": 0.6, "edit": None,
}  # fmt: skip
EXACT, CACHED = Way(preset="exact", cache="none"), Way(preset="exact", cache="firstblock")


@pytest.fixture(scope="module")
def pipe():
    return FAMILIES["sd3"].tiny()


@pytest.fixture(scope="module")
def site(launch, pipe):
    return launch({"tiny": pipe}, engine={"queue": 1, "threads": 1})


@pytest.fixture
def studio(site):
    return Studio(site.app.state.server, Inputs(seconds=60, most_bytes=10**7))


def states(events):
    async def gather():
        return [state async for state in events]

    return asyncio.run(gather())


def form(**fields):
    return Form(**{**FIELDS, **fields})


def test_the_states_of_a_picture(studio, site):
    states(studio.draw(form(), visitor="one"))  # previews are learned from a first picture
    found = states(studio.draw(form(), visitor="one"))
    assert found[0]["state"] == "waiting"
    assert [one["step"] for one in found if one["state"] == "drawing" and "preview" not in one][:2] == [0, 1]
    assert found[-2]["preview"].startswith("data:image/jpeg;base64,")
    picture = found[-1]["picture"]
    assert found[-1]["state"] == "done"
    assert (picture["width"], picture["height"], picture["effective"]["seed"]) == (64, 64, 3)
    assert picture["timings"]["denoise_s"] > 0
    assert {note["name"] for note in picture["applied"]} >= {"attention", "quant"}
    assert picture["form"]["seed"] == "3"
    small = Image.open(io.BytesIO(base64.b64decode(picture["thumb"].partition(",")[2])))
    assert small.size == (64, 64)
    with site.http as http:
        assert Image.open(io.BytesIO(http.get(picture["url"]).content)).text["prompt"] == "a red circle"


def test_the_file_says_how_it_was_made(studio, site, tmp_path):
    from vivace.generation.picture import facts

    picture = states(studio.draw(form(), visitor=None))[-1]["picture"]
    with site.http as http:
        (tmp_path / "x.png").write_bytes(http.get(picture["url"]).content)
    found = facts(tmp_path / "x.png")
    assert (found["prompt"], found["seed"], found["settings"]["steps"]) == ("a red circle", 3, 4)


def test_a_mistake(studio):
    (found,) = states(studio.draw(form(steps=1000), visitor=None))
    assert found == {"state": "error", "message": "steps is 1000, the most is 150", "field": "steps"}


def test_nobody_listens_any_more(studio, site, pipe, hold, until):
    held = hold(pipe.transformer)
    held.shut()

    async def leave():
        events = studio.draw(form(), visitor="one")
        async for state in events:
            if state["state"] == "drawing":
                break
        await events.aclose()

    asyncio.run(leave())
    until(lambda: site.engine.running == 0)
    held.remove()
    assert studio._jobs == {}


def test_cancel_is_one_s_own(studio, site, pipe, hold):
    held = hold(pipe.transformer)
    held.shut()

    async def both():
        events = studio.draw(form(), visitor="one")
        await anext(events)
        studio.cancel("another")
        studio.cancel(None)
        assert not any(job.stop for job in studio._jobs["one"])
        studio.cancel("one")
        return [state async for state in events]

    assert asyncio.run(both())[-1] == {"state": "cancelled"}
    held.remove()


def test_a_full_queue_says_so(studio, site, pipe, hold, until):
    from vivace.serve import Request

    held = hold(pipe.transformer)
    held.shut()
    jobs = [site.engine.submit(Request(prompt="a", size=(64, 64), steps=2))]
    until(held.reached.is_set)
    jobs.append(site.engine.submit(Request(prompt="a", size=(64, 64), steps=2)))
    (found,) = states(studio.draw(form(), visitor=None))
    assert found["state"] == "error"
    assert "waiting" in found["message"]
    held.remove()
    for job in jobs:
        job.result(240)


def test_two_ways(studio):
    found = states(compare(studio, form(seed=""), ways=(EXACT, CACHED), visitor=None))
    order = [(one["side"], one["state"]) for one in found[:-1]]
    assert order.index((0, "warming")) < order.index((0, "drawing")) < order.index((1, "warming"))
    last = found[-1]
    assert last["state"] == "compared"
    one, other = last["sides"]
    assert (one["title"], other["title"]) == ("exact", "exact + firstblock")
    assert one["effective"]["seed"] == other["effective"]["seed"]
    assert other["effective"]["cache"].startswith("firstblock")
    assert min(one["seconds"], other["seconds"]) > 0
    assert [side["timings"]["total_s"] for side in (one, other)] == [one["seconds"], other["seconds"]]
    assert one["timings"]["queue_s"] == 0.0
    assert one["form"]["cache"] == "none"
    assert 0 <= last["difference"] <= 1


def test_the_same_way_is_the_same_picture(studio):
    last = states(compare(studio, form(), ways=(EXACT, EXACT), visitor=None))[-1]
    assert last["difference"] <= 1 / 255


def test_both_are_checked_before_either_is_drawn(studio):
    odd = Way(preset="exact", cache="no-such-cache")
    found = states(compare(studio, form(), ways=(EXACT, odd), visitor=None))
    assert found[-1]["state"] == "error"
    assert "no-such-cache" in found[-1]["message"] or "unknown cache" in found[-1]["message"]


def test_difference():
    black, white = (Image.new("RGB", (8, 8), colour) for colour in ("black", "white"))
    assert difference(black, white) == 1
    assert difference(white, white) == 0
    assert difference(white, Image.new("RGB", (4, 4))) == 1
