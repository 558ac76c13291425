"""The page after its connection broke, its sign-in ran out, or its server began anew."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from vivace.families import FAMILIES

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect
pytestmark = pytest.mark.timeout(900)
KEY = "a-key-for-these-tests-alone"


@pytest.fixture(scope="module")
def site(launch):
    return launch({"tiny": FAMILIES["sd3"].tiny()}, api_key=KEY)


@pytest.fixture
def page(browser, site) -> Iterator[Any]:
    """A page that is signed in; what the browser says of broken connections is no mistake here."""
    context = browser.new_context()
    context.set_default_timeout(240_000)
    page = context.new_page()
    page.goto(site.url)
    sign_in(page)
    yield page
    context.close()


def sign_in(page: Any) -> None:
    page.locator("#key").fill(KEY)
    page.get_by_role("button", name="Open").click()
    page.locator("body[data-ready]").wait_for()


def draw(page: Any, prompt: str) -> None:
    page.locator("#prompt textarea").fill(prompt)
    page.locator("#steps input[type=number]").fill("2")
    page.locator("#draw").click()


def drawn(page: Any, prompt: str) -> None:
    expect(page.locator("#stage .headline .prompt")).to_have_text(prompt)
    expect(page.locator("#draw")).to_be_visible()


def test_a_page_whose_connection_broke_comes_back_by_itself(page):
    draw(page, "one before")
    drawn(page, "one before")
    page.route("**/queue/data?*", lambda route: route.abort(), times=1)
    page.evaluate("document.body.dataset.old = ''")
    draw(page, "one lost")
    page.locator("body[data-ready]:not([data-old])").wait_for()
    expect(page.locator("#gallery .cards li")).to_have_count(1)
    expect(page.locator("#prompt textarea")).to_have_value("one lost")
    draw(page, "one after")
    drawn(page, "one after")


def test_who_is_signed_in_no_longer_is_told_and_nothing_hangs(page):
    page.context.clear_cookies()
    draw(page, "one too late")
    expect(page.get_by_text("You are signed in no longer")).to_be_visible()
    expect(page.locator("#draw")).to_be_visible()
    expect(page.locator("#prompt textarea")).to_have_value("one too late")
    page.reload()
    sign_in(page)
    expect(page.locator("#prompt textarea")).to_have_value("one too late")
    draw(page, "one in time")
    drawn(page, "one in time")


def test_a_server_that_began_anew_asks_for_the_key_again(page):
    """Its cookies are none of the former one's."""
    page.route("**/queue/data?*", lambda route: (page.context.clear_cookies(), route.abort()), times=1)
    draw(page, "one lost")
    sign_in(page)
    draw(page, "one after")
    drawn(page, "one after")
