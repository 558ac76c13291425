"""The page on Ray, in a real browser: signing in while the queue is full, drawing, what was applied, cancelling."""

import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("gradio", reason="needs the extra [ui]")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="this machine has no chromium; apt-get install chromium"),
    pytest.mark.timeout(900),  # clusters start slowly on a busy machine
]
expect = playwright.expect

PATIENCE = 240_000  # milliseconds
KEY = "a-key-of-the-tests-alone"
LONG = {"prompt": "a", "size": "64x64", "steps": 150, "frames": 65}


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        options = ["--disable-gpu", "--no-sandbox"] if os.name == "posix" and os.geteuid() == 0 else ["--disable-gpu"]
        found = running.chromium.launch(executable_path=CHROMIUM, args=options)
        expect.set_options(timeout=PATIENCE)
        yield found
        found.close()


@pytest.fixture
def aside():
    """Calls in another thread what waits for Ray, which refuses to where playwright has its event loop."""
    with ThreadPoolExecutor(1) as pool:
        yield lambda call, *given: pool.submit(call, *given).result()


@pytest.fixture
def page(browser, live):
    """Behind the sign-in."""
    context = browser.new_context()
    context.set_default_timeout(PATIENCE)
    found = context.new_page()
    found.goto(f"{live.url}/ui/")
    found.locator("#key").fill(KEY)
    found.get_by_role("button", name="Open").click()
    found.locator("body[data-ready]").wait_for()
    yield found
    context.close()


@pytest.fixture
def full(live, until, aside):
    """All places are taken, and the queue is full."""
    with live.http as http:
        names = [http.post("/v1/videos", json=LONG).json()["id"] for _ in range(4)]
        until(lambda: aside(live.facts)["running"] == 4)
        names += [http.post("/v1/videos", json=LONG).json()["id"] for _ in range(4)]
        yield
        for name in reversed(names):
            http.delete(f"/v1/videos/{name}")
        until(lambda: aside(live.idle))


def fill(page, prompt, *, steps):
    page.locator("#prompt textarea").fill(prompt)
    page.locator("#size input").fill("64x64")
    page.locator("#size input").press("Enter")
    page.locator("#steps input[type=number]").fill(str(steps))
    page.locator("#steps input[type=number]").press("Tab")


def draw(page, prompt, *, steps):
    fill(page, prompt, steps=steps)
    page.locator("#draw").click()


def test_a_picture_and_what_was_applied(page):
    draw(page, "a red circle", steps=3)
    page.locator("#stage [data-state=done]").wait_for()
    page.wait_for_function("() => document.querySelector('#stage .frame img')?.naturalWidth > 0")
    expect(page.locator("#stage .applied summary")).to_have_text(re.compile(r"What was applied \(\d+ of \d+\)"))
    page.locator("#stage .applied summary").click()
    expect(page.locator("#stage .applied")).to_contain_text("attention")
    expect(page.locator("#stage .applied")).to_contain_text("3 denoiser calls")


def test_a_comparison_is_warmed_up_where_it_is_drawn(page, live, until, aside):
    """Two requests, so that neither's warming up can go to another replica than its picture."""
    done = aside(live.outcomes, "done")
    fill(page, "a red circle", steps=3)
    page.get_by_role("tab", name="Compare").click()
    page.locator("#both").click()
    page.locator("#compare [data-state=compared]").wait_for()
    for number in range(2):
        expect(page.locator("#compare .side .took").nth(number)).to_have_text(re.compile(r"\d s$"))
    until(lambda: aside(live.idle))
    assert aside(live.outcomes, "done") == done + 2


def test_cancel_reaches_the_replica(page, live, until, aside):
    cancelled = aside(live.outcomes, "cancelled")
    draw(page, "a red circle", steps=150)
    until(lambda: (page.wait_for_timeout(50), aside(live.facts)["running"])[1])
    page.locator("#cancel").click()
    page.locator("#stage [data-state=cancelled]").wait_for()
    until(lambda: aside(live.idle))
    until(lambda: aside(live.outcomes, "cancelled") == cancelled + 1)


def test_signing_in_does_not_wait_for_a_place(full, page):
    draw(page, "a red circle", steps=2)
    page.locator("#stage [data-state=error]").wait_for()
    expect(page.locator("#stage [role=alert]")).to_contain_text("4 requests are waiting")
