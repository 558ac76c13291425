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
    """Choose the other model, and wait for what it changes: that would change what is typed meanwhile."""
    if page.locator("#model input").input_value() != alias:
        page.locator("#model input").click()
        page.locator("#model").get_by_role("option", name=alias).click()
    expect(page.locator("#editing")).to_have_count(int(alias == "edits"))


def draw(page: Any, prompt: str) -> None:
    page.locator("#prompt textarea").fill(prompt)
    page.locator("#steps input[type=number]").fill("2")
    page.locator("#draw").click()
    expect(page.locator("#stage .headline .prompt")).to_have_text(prompt)


def test_a_model_s_own_values_are_asked_for_once_a_choice(visit, site):
    """A second answer that comes late would undo what was typed since the first."""
    asked = []
    page = visit()
    page.on("request", lambda one: asked.append(one.post_data_json["data"]) if "queue/join" in one.url else None)
    first, second = site.engine.models
    choose(page, second)
    choose(page, first)
    page.locator("#model input").fill(second)
    page.locator("#model input").press("Enter")
    expect(page.locator("#editing")).to_have_count(int(second == "edits"))
    draw(page, "one of the second")
    choose(page, first)
    page.locator("#gallery").get_by_text("Use again").click()
    expect(page.locator("#editing")).to_have_count(int(second == "edits"))
    choose(page, first)
    chosen = [one[0] for one in asked if len(one) == 1 and one[0]]
    assert chosen == [second, first, second, first, first]


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
    expect(page.locator("#stage .edit")).to_be_hidden()
    draw(page, "one drawn")
    assert [(request.model, len(request.images)) for request in asked] == [("edits", 1), ("plain", 0)]
    choose(page, "edits")
    expect(page.locator("#input .drop")).to_be_visible()


def test_use_again_sets_another_model_s_fields_too(visit):
    page = visit()
    choose(page, "edits")
    wanted = {"seed": "7", "guidance": "4.5", "size": "64x64", "negative": "a star"}
    for name, value in wanted.items():
        field = page.locator(f"#{name} :is(input:not([type=range]), textarea)").first
        field.fill(value)
        field.press("Enter" if name == "size" else "Tab")
    draw(page, "one of another model")
    choose(page, "plain")
    draw(page, "one between")
    page.locator("#gallery .cards li").nth(1).get_by_text("Use again").click()
    # All of one answer: with this part, what was before it is there.
    expect(page.locator("#editing")).to_be_visible()
    for name, value in {**wanted, "model": "edits", "steps": "2", "prompt": "one of another model"}.items():
        field = page.locator(f"#{name} :is(input:not([type=range]), textarea)").first
        expect(field).to_have_value(value)
    draw(page, "the same again")
    facts = page.locator("#stage .facts")
    for told in ("4.5", "64 × 64", "a star", "edits"):
        expect(facts).to_contain_text(told)
