"""Pictures to edit: what is taken, how long it is kept."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from vivace.families import FAMILIES
from vivace.serve.failures import FieldError
from vivace.serve.ui.inputs import Input, Inputs


def png(size=(64, 48), colour="red", mode="RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def site(launch):
    limits = {"most_upload": 20_000, "most_upload_pixels": 10_000}
    return launch({"tiny": FAMILIES["sd3"].tiny()}, **limits)


@pytest.fixture
def send(site):
    with site.http as http:
        yield lambda *files: http.post("/ui/inputs", files=[(name, ("x.png", raw, "image/png")) for name, raw in files])


def test_a_picture_gets_a_name(send):
    one, two = send(("image", png())), send(("image", png()), ("mask", png(mode="L", colour="white")))
    assert one.status_code == two.status_code == 200
    assert one.json()["id"] != two.json()["id"]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([("image", b"no picture")], "no PNG, JPEG or WebP"),
        ([("image", png((200, 100)))], "200x100 pixels"),
        ([("image", b"\x89PNG" + bytes(20_001))], "larger than 20000 bytes"),
        ([("mask", png())], "one image"),
        ([("image", png()), ("mask", png((32, 32)))], "not of the image's size"),
        ([("image", png()), ("image", png()), ("image", png())], "cannot be read"),
        ([("other", png())], "one image"),
    ],
)
def test_what_is_refused(send, files, said):
    answer = send(*files)
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


def test_only_forms(site):
    with site.http as http:
        assert http.post("/ui/inputs", json={}).status_code == 415


def test_the_oldest_go():
    picture = Image.new("RGB", (10, 10))
    kept = Inputs(seconds=60, most_bytes=700)
    names = [kept.add(Input(picture, None)) for _ in range(3)]
    with pytest.raises(FieldError, match="not kept any more"):
        kept.get({"id": names[0]})
    assert kept.get({"id": names[1]}) is not None
    assert kept.get(None) is None


def test_they_end():
    kept = Inputs(seconds=-1, most_bytes=10**6)
    name = kept.add(Input(Image.new("RGB", (10, 10)), None))
    with pytest.raises(FieldError, match="choose it again"):
        kept.get({"id": name})


@pytest.mark.parametrize("value", ["x", 5, ["x"], {"error": "the server said no"}, {}, {"id": ["x"]}])
def test_whatever_a_browser_sends(value):
    kept = Inputs(seconds=60, most_bytes=10**6)
    if not value:
        assert kept.get(value) is None
        return
    with pytest.raises(FieldError) as found:
        kept.get(value)
    assert found.value.field == "image"
