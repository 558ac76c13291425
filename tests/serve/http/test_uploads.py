"""Forms and their pictures: what is taken, what is refused before it is decoded, and what is left of it."""

import gc
import io
import os
import resource
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from vivace.families import FAMILIES
from vivace.serve.http import uploads
from vivace.serve.http.server import DECODED
from vivace.serve.http.settings import Settings


def picture(kind="PNG", size=(64, 64), **options) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, kind, **options)
    return buffer.getvalue()


def edit(http, *files, fields=None, **more):
    parts = [("image", ("x.png", raw, "image/png")) for raw in files]
    return http.post("/v1/images/edits", files=parts, data={"prompt": "a", "steps": "2", **(fields or {})}, **more)


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


def test_few_bytes_do_not_become_much_memory_for_many_at_a_time(http, monkeypatch):
    at_once, most, guard = 0, 0, threading.Lock()

    def decode(*args, **options):
        nonlocal at_once, most
        with guard:
            at_once += 1
            most = max(most, at_once)
        try:
            time.sleep(0.1)
            return stock(*args, **options)
        finally:
            with guard:
                at_once -= 1

    stock = uploads.decode
    monkeypatch.setattr(uploads, "decode", decode)
    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(edit, http, picture(), picture()) for _ in range(6)]
    # The model takes one, which it is asked about only then.
    assert {answer.result().status_code for answer in answers} == {400}
    assert most == DECODED


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/images/edits", {"n": "4"}, "n"),
        ("/v1/images/edits", {"model": "other"}, "model"),
        ("/v1/videos", {"seconds": "999"}, "seconds"),
        ("/v1/videos", {"seconds": "10", "size": "9999x9999"}, "size"),
    ],
)
def test_nothing_is_decoded_for_what_is_refused_anyway(launch, pipe, monkeypatch, path, fields, param):
    decoded: list[str] = []
    monkeypatch.setattr(uploads, "decode", lambda *args, field, **options: decoded.append(field))
    server = launch({"tiny": pipe, "clip": FAMILIES["wan"].tiny()}, engine={"queue": 1, "threads": 2})
    name = "input_reference" if path == "/v1/videos" else "image"
    with server.http as http:
        answer = http.post(path, files={name: picture()}, data={"prompt": "a", **fields})
    assert answer.json()["error"]["param"] == param
    assert not decoded


def test_the_pictures_of_those_who_wait_are_bounded(launch, pipe, gated):
    server, gate = launch({"tiny": pipe}, held_bytes=64 * 64 * 3 * 2 - 1), gated(pipe.transformer)
    gate.shut()
    with server.http as http, ThreadPoolExecutor(1) as pool:
        first = pool.submit(edit, http, picture())
        assert gate.reached.wait(60)
        second = edit(http, picture())
        gate.open.set()
        assert first.result().status_code == 200
        assert (second.status_code, second.json()["error"]["code"]) == (429, "queue_full")
        assert "pictures of other requests" in second.json()["error"]["message"]
        assert int(second.headers["retry-after"]) >= 1
        deadline = time.monotonic() + 10
        while (again := edit(http, picture())).status_code == 429 and time.monotonic() < deadline:
            time.sleep(0.1)
    assert again.status_code == 200


@pytest.mark.parametrize("mask", [False, True])
def test_a_picture_is_held_as_it_is_drawn_over_not_as_it_came(launch, pipe, gated, mask):
    server, gate = launch({"tiny": pipe}), gated(pipe.transformer)
    gate.shut()
    raw = picture(size=(640, 672))
    files = {"image": ("x.png", raw, "image/png"), **({"mask": ("y.png", raw, "image/png")} if mask else {})}
    fields = {"prompt": "a", "steps": "2", "size": "64x64"}
    with server.http as http, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(http.post, "/v1/images/edits", files=files, data=fields)
        assert gate.reached.wait(60)
        gc.collect()
        held = [one for one in gc.get_objects() if isinstance(one, Image.Image) and one.size == (640, 672)]
        gate.open.set()
        assert answer.result().status_code == 200
    assert not held


def test_memory_of_refused_pictures_goes_back_to_the_system(launch, pipe, monkeypatch):
    given = threading.Event()
    monkeypatch.setattr("vivace.serve.http.app.SWEEP", 0.1)
    monkeypatch.setattr("vivace.memory.heap.give_back", given.set)
    with launch({"tiny": pipe}).http as http:
        assert edit(http, picture(), picture()).status_code == 400
        given.clear()
        assert given.wait(10)


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


def test_a_file_is_no_text_and_a_text_no_file(http):
    address = http.post("/v1/images/edits", files={"prompt": ("x", b"a red circle"), "image": ("x", picture())})
    assert address.json()["error"]["message"] == "prompt is a file; send it as text"
    fields = {"prompt": (None, "a"), "image": (None, "http://127.0.0.1/a.png")}
    address = http.post("/v1/images/edits", files=fields)
    assert address.json()["error"]["message"] == "image is text; send the picture itself, as a file"
    assert address.json()["error"]["param"] == "image"


def test_forms_that_cannot_be_read_say_why(http):
    several = [("image[]", ("x", picture()))] * 9
    found = http.post("/v1/images/edits", files=several, data={"prompt": "a"}).json()["error"]
    assert found["code"] == "invalid_form"
    assert "Maximum number of files is 8" in found["message"]
    found = http.post("/v1/images/edits", files={"image": picture()}, data={f"f{i}": "1" for i in range(65)}).json()
    assert "Maximum number of fields is 64" in found["error"]["message"]
    found = http.post("/v1/images/edits", content=b"x", headers={"content-type": "multipart/form-data"}).json()
    assert "Missing boundary" in found["error"]["message"]


def test_an_upload_that_finds_no_room_is_no_error_of_the_inside(http):
    """Files may not grow beyond a megabyte and a half here: to who writes them, a disk that ends there."""
    noise = Image.frombytes("RGB", (1000, 1000), os.urandom(3_000_000))
    buffer = io.BytesIO()
    noise.save(buffer, "PNG")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, before[1]))
    try:
        answer = edit(http, buffer.getvalue())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (answer.status_code, answer.json()["error"]["code"]) == (507, "disk_full")
    assert edit(http, picture()).status_code == 200


def test_file_names_of_uploads_reach_no_disk(launch, pipe, tmp_path):
    server = launch({"tiny": pipe}, folder=tmp_path / "jobs")
    name = f"../../../..{tmp_path}/owned.png"
    with server.http as http:
        answer = http.post("/v1/images/edits", files={"image": (name, picture())}, data={"prompt": "a", "steps": "1"})
    assert answer.status_code == 200
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
