"""A client that goes away: its picture is not finished for nobody."""

import gc
import io
import socket
import time

import httpx2
import pytest
import torch
from PIL import Image


def ask(server, body: bytes) -> socket.socket:
    """Sends an order and leaves the answer to come."""
    connection = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
    head = "POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


@pytest.mark.parametrize("stream", ["false", "true"])
def test_a_client_that_goes_away(launch, pipe, gated, wanted, stream, caplog):
    server = launch({"tiny": pipe})
    fresh = server.http.post("/v1/images/generations", json=wanted | {"deterministic": True}).json()["data"]
    gate = gated(pipe.transformer)
    gate.shut()
    body = f'{{"prompt": "a", "size": "64x64", "steps": 150, "stream": {stream}}}'.encode()
    connection = ask(server, body)
    assert gate.reached.wait(120)
    connection.close()
    time.sleep(0.5)
    before = len(gate.sizes)
    gate.open.set()
    deadline = time.monotonic() + 120
    while server.engine.running and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server.engine.running == server.engine.queued == 0
    assert len(gate.sizes) <= before + 1
    again = server.http.post("/v1/images/generations", json=wanted | {"deterministic": True}).json()["data"]
    assert again == fresh
    gc.collect()
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []


def test_one_that_goes_away_while_it_waits(launch, pipe, gated, order):
    server = launch({"tiny": pipe}, engine={"threads": 1})
    gate = gated(pipe.transformer)
    gate.shut()
    first = server.engine.submit(order())
    assert gate.reached.wait(120)
    connection = ask(server, b'{"prompt": "a"}')
    deadline = time.monotonic() + 120
    while not server.engine.queued and time.monotonic() < deadline:
        time.sleep(0.02)
    connection.close()
    while server.engine.queued and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server.engine.queued == 0
    gate.open.set()
    first.result(30)


def test_who_says_nothing_keeps_no_connection_and_who_is_answered_does(launch, pipe, gated, monkeypatch):
    monkeypatch.setattr("vivace.serve.http.run.IDLE_SECONDS", 0.3)
    server = launch({"tiny": pipe})
    port = int(server.url.rpartition(":")[2])
    silent, halfway, later = (socket.create_connection(("127.0.0.1", port), timeout=60) for _ in range(3))
    halfway.sendall(b"GET /livez HTTP/1.1\r\nHost: 127")
    later.sendall(b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    assert later.recv(10_000).startswith(b"HTTP/1.1 200")
    later.sendall(b"GET /l")
    gate = gated(pipe.transformer)
    gate.shut()
    asking = ask(server, b'{"prompt": "a", "size": "64x64", "steps": 1}')
    asking.settimeout(60)
    for connection in (silent, halfway, later):
        assert connection.recv(10_000) == b""
    time.sleep(1)
    gate.open.set()
    assert asking.recv(10_000).startswith(b"HTTP/1.1 200")


def test_a_wedged_worker_turns_ready_off(launch, pipe, gated, order):
    server = launch({"tiny": pipe}, engine={"stale": 0.3})
    gate = gated(pipe.transformer)
    assert server.http.get("/readyz").status_code == 200
    gate.shut()
    job = server.engine.submit(order())
    assert gate.reached.wait(120)
    time.sleep(0.5)
    answer = server.http.get("/readyz")
    assert answer.status_code == 503
    assert answer.json()["reason"] == "the device does not answer"
    assert server.http.get("/livez").status_code == 200
    assert "vivace_ready 0.0" in server.http.get("/metrics").text
    gate.open.set()
    job.result(30)
    assert server.http.get("/readyz").status_code == 200


def test_a_full_disk_fails_the_video_and_nothing_else(launch, pipe, monkeypatch, tmp_path):
    import errno
    import os

    from vivace.families import FAMILIES

    server = launch({"clip": FAMILIES["wan"].tiny()}, folder=tmp_path)
    order = {"prompt": "a", "size": "64x64", "steps": 1, "frames": 5}
    replace = os.replace

    def full(source, target):
        if str(target).endswith(".mp4"):
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        return replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    name = server.http.post("/v1/videos", json=order).json()["id"]
    deadline = time.monotonic() + 120
    while (found := server.http.get(f"/v1/videos/{name}").json())["status"] in ("queued", "in_progress"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert found["status"] == "failed"
    assert found["error"] == {"code": "disk_full", "message": "the disk is full"}
    monkeypatch.setattr(os, "replace", lambda source, target: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    answer = server.http.post("/v1/videos", json=order)
    assert (answer.status_code, answer.json()["error"]["code"]) == (507, "disk_full")
    monkeypatch.undo()
    name = server.http.post("/v1/videos", json=order).json()["id"]
    while (found := server.http.get(f"/v1/videos/{name}").json())["status"] in ("queued", "in_progress"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert found["status"] == "completed"


@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize("stream", ["false", "true"])
def test_what_came_to_nothing_leaves_no_picture_in_memory(launch, pipe, gated, stream, fails):
    server, gate, raw = launch({"tiny": pipe}), gated(pipe.transformer), io.BytesIO()
    Image.new("RGB", (640, 672)).save(raw, "PNG")
    asked = {"files": {"image": raw.getvalue()}, "data": {"prompt": "a", "size": "176x80", "stream": stream}}
    gc.collect()
    gc.disable()  # what is in a circle stays for as long as the server has little else to do
    try:
        with server.http as http:
            if fails:
                gate.fail(torch.OutOfMemoryError("CUDA out of memory."))
                assert "out_of_memory" in http.post("/v1/images/edits", **asked).text
            else:
                gate.shut()
                with pytest.raises(httpx2.TimeoutException):
                    http.post("/v1/images/edits", **asked, timeout=2)
                assert gate.reached.wait(60)
        gate.open.set()
        deadline = time.monotonic() + 10
        while (held := _pictures((176, 80))) and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        gc.enable()
    assert held == 0


def _pictures(size: tuple[int, int]) -> int:
    return sum(isinstance(one, Image.Image) and one.size == size for one in gc.get_objects())
