"""What the server refuses: strangers, other sites' pages, and more than it can bear."""

import io
import os
import socket
import time
import zlib
from pathlib import Path

import httpx2
import openai
import pytest
from PIL import Image

from vivace.errors import InputError
from vivace.serve.http.settings import Settings

KEY = "a-key-of-the-tests-alone"


def picture(kind="PNG", size=(64, 64), **options) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, kind, **options)
    return buffer.getvalue()


def edit(http, *files, fields=None, **more):
    parts = [("image", ("x.png", raw, "image/png")) for raw in files]
    return http.post("/v1/images/edits", files=parts, data={"prompt": "a", "steps": "2", **(fields or {})}, **more)


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


def test_health_is_told_under_any_name(http):
    """A container's health check asks by address, whatever name the server goes by."""
    assert http.get("/readyz", headers={"Host": "other.example"}).status_code == 200


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


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "JPEG2000", "EPS", "PPM"])
def test_only_three_formats_are_read(http, kind):
    answer = edit(http, picture(kind))
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_image"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_these_are(http, kind):
    assert edit(http, picture(kind)).status_code == 200


def test_a_bomb_is_refused_before_it_is_decoded(http):
    # A PNG header that promises 30000 x 30000 pixels, with next to nothing behind it.
    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    header = (30000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )
    answer = edit(http, bomb)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_image"


def test_uploads_are_bounded(launch, pipe):
    server = launch({"tiny": pipe}, most_upload=2000, most_files=2, most_upload_pixels=10_000)
    with server.http as http:
        assert "larger than 2000 bytes" in edit(http, os.urandom(2001)).json()["error"]["message"]
        assert "64x640 pixels" in edit(http, picture(size=(64, 640))).json()["error"]["message"]
        assert edit(http, *[picture()] * 3).status_code == 400
        assert edit(http, picture()).status_code == 200


def test_animations_and_broken_pictures_are_refused(http):
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:])
    assert "animation" in edit(http, buffer.getvalue()).json()["error"]["message"]
    for raw in (b"", b"x", picture()[:100], picture("JPEG")[:200]):
        answer = edit(http, raw)
        assert answer.status_code == 400
        assert "truncated" not in answer.text
        assert "0x" not in answer.text


def test_a_cameras_preview_behind_a_jpeg_makes_no_animation_of_it():
    from vivace.serve.http.uploads import decode

    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(
        buffer, "MPO", save_all=True, append_images=[Image.new("RGB", (32, 24), "blue")]
    )
    assert Image.open(io.BytesIO(buffer.getvalue())).format == "MPO"
    found = decode(buffer.getvalue(), Settings(), field="image")
    assert found.size == (64, 48)
    assert found.getpixel((1, 1))[0] > 200


def test_metadata_does_not_get_through():
    from vivace.serve.http.uploads import decode

    exif = Image.Exif()
    exif[0x010F] = "a camera"
    exif[0x0112] = 6  # turned by a quarter
    found = decode(picture("JPEG", size=(64, 32), exif=exif, comment=b"secret"), Settings(), field="image")
    assert found.size == (32, 64)
    assert not found.info
    assert not found.getexif()


@pytest.mark.parametrize(("mode", "grey"), [("I;16", 30_000), ("I", 30_000), ("L", 116)])
def test_sixteen_grey_bits_stay_what_they_are(mode, grey):
    from vivace.serve.http.uploads import decode

    buffer = io.BytesIO()
    Image.new(mode, (16, 16), grey).save(buffer, "PNG")
    assert decode(buffer.getvalue(), Settings(), field="image").getpixel((0, 0)) == (116, 116, 116)


def test_fields_of_forms_are_checked_too(http):
    assert edit(http, picture(), fields={"stepz": "3"}).json()["error"]["param"] == "stepz"
    assert edit(http, picture(), fields={"steps": "1000"}).json()["error"]["param"] == "steps"
    for lora in (
        {"lora": "{"},
        {"lora": "[" * 100_000},
        {"lora": "{}", "lora[a]": "1"},
        {"lora[a]": "1", "lora": "{}"},
    ):
        answer = edit(http, picture(), fields=lora)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "lora"), lora
    mask = http.post("/v1/images/edits", files={"mask": ("x", picture())}, data={"prompt": "a"})
    assert mask.json()["error"]["param"] == "image"
    wrong = http.post("/v1/images/edits", files={"other": ("x", picture())}, data={"prompt": "a"})
    assert wrong.json()["error"]["param"] == "other"


def test_file_names_of_uploads_reach_no_disk(launch, pipe, tmp_path):
    server = launch({"tiny": pipe}, folder=tmp_path / "jobs")
    name = f"../../../..{tmp_path}/owned.png"
    with server.http as http:
        answer = http.post("/v1/images/edits", files={"image": (name, picture())}, data={"prompt": "a", "steps": "1"})
    assert answer.status_code == 200
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


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
