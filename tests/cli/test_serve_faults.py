"""`vivace serve` as a process, and what befalls it: signals, kills, clients that go, a full queue, wrong neighbours."""

from __future__ import annotations

import json
import signal
import socket
import time

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

pytestmark = pytest.mark.timeout(600)

CLIP = {"size": "64x64", "extra_body": {"steps": 3, "frames": 5}}
PLAIN = {"deterministic": True}


@pytest.fixture(scope="module")
def server(launch):
    """One server for those who leave it as it was: four requests run, one waits."""
    return launch("tiny", options=("--max-running", "4", "--max-queue", "1"))


@pytest.fixture
def same(server):
    """Checks that a plain request gets the bits it got before, and that nothing is left over."""

    def draw() -> str:
        return server.ask(**PLAIN).result().json()["data"][0]["b64_json"]

    before = draw()
    server.shut()
    yield
    server.open()
    assert draw() == before
    server.until(lambda: server.counts(running=0, queue_depth=0, ready=1))


def running(server, *orders: dict) -> list:
    """These orders, all of them at the gate or on their way there."""
    asked = []
    for count, order in enumerate(orders, start=1):
        asked.append(server.ask(**order))
        server.until(lambda: server.counts(running=count))  # noqa: B023 -- called at once
    return asked


def leave(server, *, stream: bool) -> socket.socket:
    """An order whose answer nobody has read yet."""
    body = json.dumps({"prompt": "a", "size": "64x64", "steps": 50, "stream": stream}).encode()
    connection = socket.create_connection(("127.0.0.1", server.port))
    head = "POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_ends_its_request_even_at_a_call(server, same, stream):
    connection = leave(server, stream=stream)
    server.reached()
    assert server.counts(running=1)
    connection.close()
    # With the gate still shut: nobody waits for the call that is computed for nobody.
    server.until(lambda: server.counts(running=0))


def test_a_full_queue_says_so_and_loses_nothing(server, same):
    asked = running(server, *({"seed": seed} for seed in range(4)))
    asked.append(server.ask(seed=4))
    server.until(lambda: server.counts(queue_depth=1))
    refused = server.http.post("/v1/images/generations", json={"prompt": "a"})
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"
    server.open()
    answers = [one.result() for one in asked]
    assert [one.status_code for one in answers] == [200] * 5
    assert [one.json()["data"][0]["seed"] for one in answers] == [0, 1, 2, 3, 4]


def test_a_wrong_request_fails_alone_in_its_batch(server, same, folders):
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folders["tiny"], subfolder="scheduler")
    steps = {}
    for count in (31, 29):
        scheduler.set_timesteps(count)
        steps[count] = scheduler.timesteps.tolist()
    # A step that only the one of 29 has, late enough that they have met by then.
    wrong = next(at for at in steps[29][20:] if min(abs(at - other) for other in steps[31]) > 1)
    (server.gate / "wrong").write_text(repr(wrong))
    met = False
    for _ in range(5):  # that they meet is likely, not certain
        server.shut()
        *asked, bad = running(server, *({"seed": seed, "steps": 31} for seed in range(3)), {"steps": 29})
        server.open()
        assert [one.result().status_code for one in asked] == [200] * 3
        answer = bad.result()
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "failed"
        assert "secret" not in answer.text
        met = any("trying one by one" in line for line in server.lines)
        if met:
            break
    assert met
    # The log tells the operator what the client is not told, under the id that the client has.
    records = [json.loads(line) for line in server.lines if line.startswith("{")]
    asked_of = next(one for one in records if one.get("request_id") == answer.headers["x-request-id"])
    (why,) = [one for one in records if one.get("job") in asked_of["jobs"]]
    assert "a secret of the inside" in why["traceback"]


def test_what_is_drawn_when_the_end_is_asked_for_is_encoded_and_read(launch):
    server = launch("tiny", options=("--drain", "60"))
    server.shut()
    asking = server.ask()
    server.reached()
    (server.gate / "slow").write_text("4")
    server.process.send_signal(signal.SIGTERM)
    server.until(lambda: server.ready() == 503)
    server.open()
    answer = asking.result()
    assert answer is not None, server.lines
    assert answer.json()["data"][0]["b64_json"]
    assert server.wait() == 0


def test_a_device_that_does_not_answer_does_not_keep_it(launch):
    """What is left after the time to drain is given up, also where a call never ends."""
    server = launch("tiny", options=("--drain", "0.2"))
    server.shut()
    asking = server.ask()
    server.reached()
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == 0
    answer = asking.result()
    assert answer is not None
    assert answer.status_code == 503


def test_who_is_cut_off_at_the_end_is_told_so(launch):
    server = launch("tiny", options=("--drain", "0.2"))
    (server.gate / "slow").write_text("10")
    asking = server.ask()
    server.until(lambda: any('"done"' in line for line in server.http.get("/metrics").text.splitlines()))
    server.process.send_signal(signal.SIGTERM)
    answer = asking.result()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
    assert server.wait() == 0


def test_a_load_does_not_keep_it(launch):
    """Nor those who wait for the model: of a large one on a slow disk that would be minutes."""
    server = launch("tiny", options=("--drain", "0.2"), loading=True)
    asked = running(server, {}, {"stream": True})
    began = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == 0
    assert time.monotonic() - began < 60
    plain, streamed = (one.result() for one in asked)
    assert (plain.status_code, plain.json()["error"]["code"]) == (503, "unavailable")
    assert '"code": "unavailable"' in streamed.text


def test_without_its_device_it_ends_for_a_supervisor(launch):
    server = launch("tiny")
    (server.gate / "lost").touch()
    answer = server.ask().result()
    assert answer is None or answer.status_code == 503
    assert server.wait() == 70


def test_after_kill_9_the_list_tells_the_truth_and_a_second_signal_ends_it_at_once(launch, tmp_path):
    options = ("--folder", str(tmp_path), "--drain", "3600")
    server = launch("clip", options=options)
    done = server.client.videos.create(prompt="a", **CLIP).id
    server.until(lambda: server.client.videos.retrieve(done).status == "completed")
    server.shut()
    cut = [server.client.videos.create(prompt="a", **CLIP).id for _ in range(2)]
    server.until(lambda: server.counts(running=2))
    server.process.kill()
    assert server.wait() == -signal.SIGKILL
    again = launch("clip", options=options)
    found = {video.id: video for video in again.client.videos.list()}
    assert found[done].status == "completed"
    assert again.client.videos.download_content(done).read()[4:8] == b"ftyp"
    for name in cut:
        assert found[name].status == "failed"
        assert found[name].error.code == "server_restarted"
    assert {path.name for path in tmp_path.glob(".*")} == {".lock"}
    # It goes on where the other one stopped.
    fresh = again.client.videos.create(prompt="a", **CLIP).id
    again.until(lambda: again.client.videos.retrieve(fresh).status == "completed")
    again.shut()
    again.client.videos.create(prompt="a", **CLIP)
    again.reached()
    again.process.send_signal(signal.SIGTERM)
    again.until(lambda: again.ready() == 503)
    again.process.send_signal(signal.SIGTERM)
    assert again.wait() == 128 + signal.SIGTERM
