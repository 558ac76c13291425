"""The server on real Ray: what a client and a browser see of it is what the plain server does, also when a replica is
killed.
"""

import base64
import io
import itertools
import os
import re
import shutil
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import numpy as np
import openai
import pytest
from PIL import Image

from vivace.errors import InputError
from vivace.serve import Engine, Request
from vivace.serve.cluster.run import drain, serving
from vivace.serve.http.run import IDLE_SECONDS
from vivace.serve.plan import Plan

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.timeout(900)  # clusters start slowly on a busy machine

WANTED = {"prompt": "a red circle", "size": "64x64", "steps": 3, "seed": 7, "deterministic": True}
# Some 40 seconds on a core: eight of them outlast the start of a browser.
LONG = {"prompt": "a", "size": "256x256", "steps": 150, "frames": 65}
BEAT = "/ui/gradio_api/heartbeat/a-tab"
PATIENCE = 120  # seconds
BROWSER_PATIENCE = 240
KEY = "a-key-of-the-tests-alone"
HEAVY = {"prompt": "a", "size": "256x256", "steps": 150, "deterministic": True}


def pixels(answer):
    raw = base64.b64decode(answer.json()["data"][0]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(raw)))


def test_previews_come_with_the_very_first_picture(live):
    """First: a replica that has drawn something has learned them anyway."""
    pytest.importorskip("gradio", reason="the page is what they are learned for")
    events = live.client.images.generate(
        prompt="a red circle", size="64x64", stream=True, partial_images=2, extra_body={"steps": 6, "seed": 1}
    )
    assert [event.type for event in events] == [
        "image_generation.partial_image",
        "image_generation.partial_image",
        "image_generation.completed",
    ]


def test_a_picture_is_the_plain_engines(live):
    with live.http as http:
        answer = http.post("/v1/images/generations", json=WANTED)
        assert answer.status_code == 200, answer.text
        assert len(answer.headers.get_list("x-request-id")) == 1
        models = http.get("/v1/models").json()["data"]
    assert [(one["id"], one["media"], one["loaded"]) for one in models] == [
        ("tiny", "image", True),
        ("clip", "video", True),
    ]
    wanted = Request(prompt="a red circle", size=(64, 64), steps=3, seed=7, deterministic=True)
    with Engine(models={"tiny": str(live.folders["tiny"])}) as engine:
        expected = engine.submit(wanted).result(120).pictures[0]
    assert np.array_equal(pixels(answer), np.asarray(expected))


def test_who_has_no_key_gets_nothing(live):
    with httpx2.Client(base_url=live.url, timeout=60) as http:
        assert http.get("/livez").status_code == 200
        assert http.get("/v1/models").status_code == 401
        assert http.post("/v1/images/generations", json=WANTED).status_code == 401
        assert http.get("/metrics").status_code == 401


def test_every_process_listens_on_this_machine_only(live):
    """Those of Serve too: what Ray opens in each for calls between them takes pickles."""
    import psutil

    ours = {process.pid: process.cmdline() for process in psutil.Process().children(recursive=True)}
    found = [one for one in psutil.net_connections("inet") if one.status == psutil.CONN_LISTEN and one.pid in ours]
    serving = [one.pid for one in found if "ServeReplica" in " ".join(ours[one.pid])]
    assert len(set(serving)) == 3  # the door and two replicas
    assert len(serving) == 6, "Ray no longer opens it"
    assert {one.laddr.ip for one in found} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_a_connection_rests_as_long_as_on_the_plain_server(live):
    """A proxy in front goes on using it; one that ends meanwhile takes a request with it."""
    with httpx2.Client(base_url=live.url, limits=httpx2.Limits(keepalive_expiry=None)) as http:

        def port() -> int:
            return http.get("/livez").extensions["network_stream"].get_extra_info("client_addr")[1]

        before = port()
        time.sleep(IDLE_SECONDS + 3)
        assert port() == before


def test_what_is_wrong_is_said_at_the_door(live):
    with pytest.raises(openai.BadRequestError) as error:
        live.client.images.generate(prompt="a", size="63x64")
    assert error.value.param == "size"
    with pytest.raises(openai.BadRequestError, match="room for 8"):
        live.client.images.generate(prompt="a", size="64x64", n=9)


def test_a_video_from_beginning_to_end(live, until):
    begun = live.client.videos.create(prompt="a", size="64x64", extra_body={"steps": 2, "frames": 5, "seed": 3})
    until(lambda: live.client.videos.retrieve(begun.id).status not in ("queued", "in_progress"))
    assert live.client.videos.retrieve(begun.id).status == "completed"
    assert live.client.videos.download_content(begun.id).read()[4:8] == b"ftyp"
    assert begun.id in [one.id for one in live.client.videos.list()]
    assert live.client.videos.delete(begun.id).deleted


def test_a_full_queue_and_a_cancel_that_reaches_the_steps(live, until):
    done, cancelled = live.outcomes("done"), live.outcomes("cancelled")
    with live.http as http:
        names = [http.post("/v1/videos", json=LONG).json()["id"] for _ in range(4)]
        until(lambda: live.facts()["running"] == 4)
        names += [http.post("/v1/videos", json=LONG).json()["id"] for _ in range(4)]
        refused = http.post("/v1/images/generations", json=WANTED)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "queue_full"
        assert int(refused.headers["retry-after"]) >= 1
        for name in reversed(names):  # those that wait first, lest they take a place
            assert http.delete(f"/v1/videos/{name}").json()["deleted"]
        until(live.idle)
    until(lambda: live.outcomes("cancelled") - cancelled == 4)  # a step may be under way
    assert live.outcomes("done") == done


def test_a_client_that_goes_away_ends_its_picture(live, until):
    cancelled = live.outcomes("cancelled")
    body = b'{"prompt": "a", "size": "256x256", "steps": 150}'
    with socket.create_connection(("127.0.0.1", int(live.url.rpartition(":")[2]))) as connection:
        head = "POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        key = "Authorization: Bearer a-key-of-the-tests-alone\r\n"
        connection.sendall(f"{head}{key}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: live.facts()["running"])
    until(live.idle)
    until(lambda: live.outcomes("cancelled") == cancelled + 1)


@pytest.mark.parametrize(("host", "further"), [("localhost", 0), ("127.0.0.1", 1)])
def test_a_second_start_at_another_place_is_refused(live, host, further):
    """Ray Serve goes on listening where it began: for anybody, where a start on the loopback device asks for no key."""
    port = int(live.url.rpartition(":")[2])
    said = rf"listens on 127\.0\.0\.1:{port}, not on {host}:{port + further}; give --host 127\.0\.0\.1 --port {port}"
    plan = Plan(gpus=0, host=host)
    with pytest.raises(InputError, match=said), serving(plan, api_key=None, port=port + further, own=False):
        pytest.fail("it is served somewhere else than was asked for")
    with live.http as http:
        assert http.get("/readyz").status_code == 200


@pytest.fixture
def aside():
    """Calls in another thread what waits for Ray, which refuses to where playwright has its event loop."""
    with ThreadPoolExecutor(1) as pool:
        yield lambda call, *given: pool.submit(call, *given).result()


@pytest.fixture
def expect():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    playwright.expect.set_options(timeout=1000 * BROWSER_PATIENCE)
    return playwright.expect


@pytest.fixture
def page(live, expect):
    """Behind the sign-in, in a real browser."""
    pytest.importorskip("gradio", reason="needs the extra [ui]")
    if CHROMIUM is None:
        pytest.skip("this machine has no chromium; apt-get install chromium")
    from playwright.sync_api import sync_playwright

    options = ["--disable-gpu", "--no-sandbox"] if os.name == "posix" and os.geteuid() == 0 else ["--disable-gpu"]
    with sync_playwright() as running, running.chromium.launch(executable_path=CHROMIUM, args=options) as browser:
        found = browser.new_page()
        found.set_default_timeout(1000 * BROWSER_PATIENCE)
        found.goto(f"{live.url}/ui/")
        found.locator("#key").fill(KEY)
        found.get_by_role("button", name="Open").click()
        found.locator("body[data-ready]").wait_for()
        yield found


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


def test_a_picture_and_what_was_applied(page, expect):
    draw(page, "a red circle", steps=3)
    page.locator("#stage [data-state=done]").wait_for()
    page.wait_for_function("() => document.querySelector('#stage .frame img')?.naturalWidth > 0")
    expect(page.locator("#stage .applied summary")).to_have_text(re.compile(r"What was applied \(\d+ of \d+\)"))
    page.locator("#stage .applied summary").click()
    expect(page.locator("#stage .applied")).to_contain_text("attention")
    expect(page.locator("#stage .applied")).to_contain_text("3 denoiser calls")


def test_a_comparison_is_warmed_up_where_it_is_drawn(page, expect, live, until, aside):
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


def test_signing_in_does_not_wait_for_a_place(full, page, expect):
    draw(page, "a red circle", steps=2)
    page.locator("#stage [data-state=error]").wait_for()
    expect(page.locator("#stage [role=alert]")).to_contain_text("4 requests are waiting")


def test_a_killed_replica_loses_no_request(live, until):
    """Last: the replica that comes in its stead takes its time."""
    answers = {}

    def ask(seed):
        with live.http as http:
            answers[seed] = http.post("/v1/images/generations", json=HEAVY | {"seed": seed})

    retried = live.facts()["retried"]
    clients = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for client in clients:
        client.start()
    until(lambda: len(live.facts()["drawing"]) == 2)
    os.kill(live.facts()["drawing"][0], signal.SIGKILL)
    for client in clients:
        client.join(120)
    assert sorted(answers) == [*range(6)], "a request hangs"
    assert live.facts()["retried"] > retried
    for answer in answers.values():
        assert answer.status_code == 200 or (answer.status_code == 503 and answer.headers["retry-after"]), answer.text
    assert any(answer.status_code == 200 for answer in answers.values())


def test_an_open_page_does_not_hold_up_the_end(live, until):
    """Last of all: the door takes nothing more."""
    pytest.importorskip("gradio", reason="needs the extra [ui]")
    until(live.idle)
    with live.http as http, http.stream("GET", BEAT) as beats:
        lines = beats.iter_lines()
        assert next(lines) == "data: ALIVE"
        drain(live.door, seconds=PATIENCE)
        assert not live.door.busy.remote().result(timeout_s=PATIENCE)
        # By itself it goes on for ever, a line every 15 seconds.
        assert len(list(itertools.islice(filter(None, lines), 9))) < 9
        assert http.get(BEAT).status_code == 503
