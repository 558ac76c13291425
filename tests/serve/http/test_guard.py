"""What the server refuses: strangers, other sites' pages, and more than it can bear."""

import io
import json
import socket
import threading
import time
from pathlib import Path

import httpx2
import openai
import pytest
from PIL import Image

from vivace.errors import InputError
from vivace.serve import Engine
from vivace.serve.failures import Unavailable
from vivace.serve.http.settings import Settings

KEY = "a-key-of-the-tests-alone"


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def locked(launch, pipe):
    return launch({"tiny": pipe}, api_key=KEY)


def test_beyond_loopback_only_with_a_key():
    with pytest.raises(InputError, match="--api-key"):
        Settings(host="0.0.0.0")
    with pytest.raises(InputError, match="16 characters"):
        Settings(api_key="short")
    for key in ("sixteen or more ", "schlüsselschlüssel"):
        with pytest.raises(InputError, match="no header carries"):
            Settings(api_key=key)
    assert Settings(host="0.0.0.0", api_key=KEY).api_key == KEY
    for host in ("127.0.0.1", "::1", "localhost", "127.1.2.3"):
        Settings(host=host)


def test_the_key_is_needed_on_every_route(locked):
    with httpx2.Client(base_url=locked.url) as http:
        described = locked.app.openapi()["paths"]
        paths = {(method.upper(), path) for path, methods in described.items() for method in methods}
        assert len(paths) > 10
        paths |= {("GET", "/openapi.json"), ("GET", "/docs"), ("GET", "/nowhere"), ("OPTIONS", "/v1/models")}
        for method, path in sorted(paths):
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}):
                code = http.request(method, path.replace("{", "").replace("}", ""), headers=headers).status_code
                assert (code == 401) is (path not in ("/livez", "/readyz")), (method, path, code)
    assert openai.OpenAI(base_url=f"{locked.url}/v1", api_key=KEY).models.list().data[0].id == "tiny"


def test_a_key_beyond_ascii_is_just_wrong(locked):
    raw = socket.create_connection(("127.0.0.1", int(locked.url.rpartition(":")[2])))
    raw.sendall(b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer k\xc3\xa4y\r\n\r\n")
    assert b" 401 " in raw.recv(200)
    raw.close()


def test_signed_links_stand_in_for_the_key(locked):
    body = {"steps": 1}
    answer = locked.client.images.generate(prompt="a", size="64x64", response_format="url", extra_body=body)
    with httpx2.Client(base_url=locked.url) as stranger:
        assert stranger.get(answer.data[0].url).status_code == 200
        assert stranger.get(answer.data[0].url.partition("?")[0]).status_code == 401
        assert stranger.get("/v1/files/x?expires=99999999999&signature=0").status_code == 401


def test_links_expire(launch, pipe):
    server = launch({"tiny": pipe}, link_seconds=0.5)
    body = {"steps": 1}
    answer = server.client.images.generate(prompt="a", size="64x64", response_format="url", extra_body=body)
    time.sleep(1.6)
    assert server.http.get(answer.data[0].url).status_code == 404


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://["}, 403),
        ({"Host": "["}, 421),
        ({"Host": "evil.example"}, 421),
        ({"Host": "127.0.0.1.evil.example"}, 421),
        ({"Host": "localhost"}, 200),
    ],
)
def test_pages_of_other_sites_are_refused(http, headers, code):
    answer = http.get("/v1/models", headers=headers)
    assert answer.status_code == code
    assert "access-control-allow-origin" not in answer.headers


def test_names_of_hosts_have_no_capitals(launch, pipe):
    with launch({"tiny": pipe}, allowed_hosts=("Draw.Example.com",)).http as http:
        for name, status in (("draw.example.com", 200), ("DRAW.example.COM:443", 200), ("example.com", 421)):
            assert http.get("/v1/models", headers={"host": name}).status_code == status, name


def test_health_is_told_under_any_name(http):
    """A container's health check asks by address, whatever name the server goes by."""
    assert http.get("/readyz", headers={"Host": "other.example"}).status_code == 200


@pytest.mark.parametrize("path", ["/livez", "/readyz"])
def test_health_is_told_without_its_words_too(http, path):
    answer = http.head(path)
    assert (answer.status_code, answer.content) == (200, b"")


def test_no_websocket_is_opened(shared):
    raw = socket.create_connection(("127.0.0.1", int(shared.url.rpartition(":")[2])))
    headers = ("Host: evil.example", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13")
    key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
    raw.sendall("\r\n".join(("GET /v1/models HTTP/1.1", *headers, key, "", "")).encode())
    assert raw.recv(200).split()[1] == b"403"
    raw.close()


def test_no_permissive_cors(http):
    asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    answer = http.options("/v1/images/generations", headers=asked)
    assert answer.status_code == 403
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded"])
def test_simple_forms_of_other_sites_are_refused(http, kind):
    answer = http.post("/v1/images/generations", content=b'{"prompt": "a"}', headers={"content-type": kind})
    assert answer.status_code == 415


def test_large_bodies_are_refused_by_length(http):
    answer = http.post("/v1/images/generations", content=b"x" * 1_000_001, headers={"content-type": "application/json"})
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"


def test_large_bodies_are_refused_as_they_come(http):
    def drip():
        for _ in range(40):
            yield b"x" * 50_000

    answer = http.post("/v1/images/generations", content=drip(), headers={"content-type": "application/json"})
    assert answer.status_code == 413


def drip(url, *, every, count):
    """What a server answers to a body that comes byte by byte."""
    head = "POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=60) as raw:
        raw.sendall(f"{head}Content-Length: {count}\r\n\r\n".encode())
        for _ in range(count):
            try:
                raw.sendall(b" ")
            except OSError:  # it has been closed
                break
            time.sleep(every)
        return b"".join(iter(lambda: raw.recv(4096), b""))


def test_a_body_that_does_not_come_is_not_waited_for(launch, pipe):
    url = launch({"tiny": pipe}, body_seconds=0.5, body_rate=1000).url
    began = time.monotonic()
    said = drip(url, every=0.1, count=12)
    assert said.startswith(b"HTTP/1.1 408 ")
    assert b"body_too_slow" in said
    assert b"connection: close" in said.lower()
    assert time.monotonic() - began < 20  # and not the rest of a keep-alive


def test_a_body_that_comes_slowly_has_the_more_time_the_more_of_it_came(launch, pipe):
    url = launch({"tiny": pipe}, body_seconds=0.5, body_rate=2).url
    assert drip(url, every=0.1, count=12).startswith(b"HTTP/1.1 400 ")  # blanks are no JSON, which it saw to the end


def test_an_answer_may_take_longer_than_its_body(launch, pipe, wanted, gated):
    server = launch({"tiny": pipe}, body_seconds=0.2)
    gate = gated(pipe.transformer)
    gate.shut()
    threading.Timer(1.0, gate.open.set).start()
    assert server.http.post("/v1/images/generations", json=wanted).status_code == 200


def test_a_full_queue_refuses_before_the_body(launch, pipe, gated, order):
    server = launch({"tiny": pipe}, engine={"threads": 1, "queue": 1})
    gate = gated(pipe.transformer)
    gate.shut()
    jobs = [server.engine.submit(order())]
    assert gate.reached.wait(120)
    jobs.append(server.engine.submit(order()))
    answer = server.http.post("/v1/images/generations", content=b"{", headers={"content-type": "application/json"})
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"]["type"] == "rate_limit_error"
    gate.open.set()
    for job in jobs:
        job.result(30)
    assert server.client.images.generate(prompt="a", size="64x64", extra_body={"steps": 1}).data


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\r\n\r\n",  # TLS
        b"GET /livez HTTP/1.1\r\n\r\n",  # no host
        b"POST /v1/videos HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_no_http_gets_the_envelope_too(shared, sent):
    with socket.create_connection(("127.0.0.1", int(shared.url.rpartition(":")[2])), timeout=30) as connection:
        connection.sendall(sent)
        found = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = found.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 4")
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "path",
    ["/v1/videos/..%2f..%2fetc%2fpasswd", "/v1/videos/video_x/content", "/v1/files/..%2f..", "/v1/models/%2e%2e"],
)
def test_no_path_leads_out(http, path):
    assert http.get(path).status_code in (400, 404)


def test_no_url_is_ever_fetched(http):
    with socket.socket() as trap:
        trap.bind(("127.0.0.1", 0))
        trap.listen()
        trap.settimeout(0.3)
        address = f"http://127.0.0.1:{trap.getsockname()[1]}/x.png"
        for field in ("image", "image_url", "input_reference", "mask"):
            assert http.post("/v1/images/generations", json={"prompt": "a", field: address}).status_code == 400
            form = http.post(
                "/v1/images/edits", files={"image": ("x", picture())}, data={"prompt": "a", field: address}
            )
            assert form.status_code == 400
        with pytest.raises(TimeoutError):
            trap.accept()


def test_errors_say_nothing_of_the_inside(launch, pipe, gated, wanted):
    server = launch({"tiny": pipe})
    gate = gated(pipe.transformer)
    gate.fail(RuntimeError("secret at 0x7f00 in /root/x.py"), times=100)
    with server.http as http:
        answer = http.post("/v1/images/generations", json=wanted)
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert str(Path("/root")) not in answer.text
    assert answer.json()["error"]["code"] == "failed"


@pytest.mark.parametrize(
    "index", [{"_class_name": ["evil", "Evil"]}, {"transformer": ["evil", "Evil"]}], ids=["pipeline", "part"]
)
def test_no_model_brings_code_of_its_own(pipe, order, tmp_path, index):
    pipe.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | index), "utf-8")
    for file in (path.parent / "evil.py", path.parent / "transformer" / "evil.py"):
        file.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n", "utf-8")
    with pytest.raises((InputError, Unavailable)), Engine(models={"x": str(path.parent)}) as engine:
        engine.submit(order()).result(60)
    assert not (tmp_path / "ran").exists()


def test_only_safetensors(tmp_path, pipe):
    from vivace.serve import Engine, Spec

    pickled = tmp_path / "style.bin"
    pickled.write_bytes(b"\x80\x04.")
    with pytest.raises(InputError, match="safetensors"):
        Engine(models={"tiny": Spec(source=pipe, loras={"style": pickled})})
    with pytest.raises(InputError, match="safetensors"):
        Engine(models={"tiny": str(pickled)})


@pytest.mark.parametrize("charset", ["undefined", "punycode"])
@pytest.mark.parametrize("path", ["/v1/images/edits", "/v1/videos"])
def test_a_charset_that_is_none_for_text_is_the_clients_mistake(http, path, charset):
    body = b'--x\r\nContent-Disposition: form-data; name="+2AA-"\r\n\r\n1\r\n--x--\r\n'
    headers = {"content-type": f"multipart/form-data; boundary=x; charset={charset}"}
    answer = http.post(path, content=body, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_form")


def test_methods_that_clients_invent_are_counted_as_one(http):
    for number in range(20):
        assert http.request(f"INVENTED{number}", "/x").status_code == 404
    told = http.get("/metrics").text
    assert "INVENTED" not in told
    assert 'route="OTHER unknown",status="404"' in told


def test_an_unexpected_error_is_counted_and_logged_under_its_requests_name(launch, pipe, monkeypatch, caplog):
    server = launch({"tiny": pipe})

    def fail(*_):
        raise KeyError("secret")

    monkeypatch.setattr(server.app.state.server.shelf, "all", fail)
    answer = server.http.get("/v1/videos")
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in answer.text
    (record,) = [one for one in caplog.records if one.exc_info]
    assert record.facts == {"request_id": answer.headers["x-request-id"]}
    assert 'route="GET /v1/videos",status="500"' in server.http.get("/metrics").text


def test_what_asks_every_few_seconds_does_not_fill_the_log(http, caplog):
    with caplog.at_level("INFO", logger="vivace.serve.access"):
        for path in ("/livez", "/readyz", "/metrics", "/v1/models"):
            assert http.get(path).status_code == 200
        assert http.get("/metrics", headers={"Host": "other.example"}).status_code == 421
        lines, deadline = [], time.monotonic() + 10
        while len(lines) < 2 and time.monotonic() < deadline:  # written when the client has its answer already
            lines = [record for record in caplog.records if record.name == "vivace.serve.access"]
    assert [line.facts["status"] for line in lines] == [200, 421]
    assert lines[0].facts["route"] == "/v1/models"


def test_names_that_clients_invent_are_not_repeated_whole(http):
    for body in ({"prompt": "a", "x" * 500_000: 1}, {"prompt": "a", "lora": {"x" * 500_000: 1}}):
        answer = http.post("/v1/images/generations", json=body)
        assert answer.status_code == 400
        assert len(answer.content) < 1000
    form = {"prompt": (None, "a"), "x" * 5_000: (None, "1")}
    assert len(http.post("/v1/images/edits", files=form).content) < 1000


def test_a_client_that_leaves_within_its_body_is_no_error(shared, caplog):
    with caplog.at_level("INFO"):
        connection = socket.create_connection(("127.0.0.1", int(shared.url.rpartition(":")[2])))
        head = "POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 1000\r\n\r\n".encode() + b"{")
        time.sleep(0.2)
        connection.close()
        deadline = time.monotonic() + 60
        while not (done := [one for one in caplog.records if one.name == "vivace.serve.access"]):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert done[0].facts["status"] == 499
    assert not [one for one in caplog.records if one.levelname == "ERROR"]
