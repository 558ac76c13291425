"""The page of several models in a real browser: what changes with the model that is chosen."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from vivace.families import FAMILIES

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module", params=[("edits", "plain"), ("plain", "edits")], ids="-".join)
def site(request, launch):
    """A model that takes a picture, and one that takes none, in both orders."""
    models = {"edits": FAMILIES["sd3"].tiny(), "plain": FAMILIES["pixart"].tiny()}
    # One of the sizes that PixArt's pipeline knows shapes for.
    models["plain"].transformer.register_to_config(sample_size=32)
    return launch({alias: models[alias] for alias in request.param})


def choose(page: Any, alias: str) -> None:
    page.locator("#model input").click()
    page.locator("#model").get_by_role("option", name=alias).click()


def draw(page: Any, prompt: str) -> None:
    page.locator("#prompt textarea").fill(prompt)
    page.locator("#steps input[type=number]").fill("2")
    page.locator("#draw").click()
    expect(page.locator("#stage .headline .prompt")).to_have_text(prompt)


def test_a_picture_is_edited_by_the_models_that_take_one(visit, site, tmp_path, monkeypatch):
    asked, submit = [], site.engine.submit
    monkeypatch.setattr(site.engine, "submit", lambda request, **more: asked.append(request) or submit(request, **more))
    Image.new("RGB", (64, 64), "red").save(tmp_path / "in.png")
    page = visit()
    choose(page, "edits")
    page.locator("#editing > button").click()
    page.locator("#input input[type=file]").set_input_files(tmp_path / "in.png")
    expect(page.locator("#input canvas")).to_be_visible()
    expect(page.locator("#strength")).to_be_visible()
    draw(page, "one edited")
    expect(page.locator("#stage .edit")).to_be_visible()
    choose(page, "plain")
    expect(page.locator("#editing")).to_have_count(0)
    expect(page.locator("#stage .edit")).to_be_hidden()
    draw(page, "one drawn")
    assert [(request.model, len(request.images)) for request in asked] == [("edits", 1), ("plain", 0)]
    choose(page, "edits")
    expect(page.locator("#input .drop")).to_be_visible()
