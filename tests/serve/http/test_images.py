"""The image routes, through the official client."""

import asyncio
import base64
import io
import time

import openai
import pytest
from PIL import Image

from vivace.families import FAMILIES

EXTRA = {"steps": 2, "seed": 7}


def png(**options) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((64, 64)).convert(options.pop("mode", "RGB")).save(buffer, "PNG", **options)
    return buffer.getvalue()


def picture(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_a_picture(client):
    answer = client.images.generate(prompt="a red circle", size="64x64", extra_body=EXTRA)
    assert picture(answer.data[0].b64_json).size == (64, 64)
    assert answer.size == "64x64"
    assert answer.created <= time.time()
    extra = answer.model_extra
    assert {name: extra[name] for name in ("model", "steps", "seed", "preset", "guidance_scale")} == {
        "model": "tiny",
        "steps": 2,
        "seed": 7,
        "preset": "exact",
        "guidance_scale": 7.0,
    }
    assert extra["timings"]["total_s"] > 0
    assert extra["calls"]["denoiser"] == 2


def test_the_built_in_model_draws(launch):
    found = launch({"builtin": "builtin"}).client.images.generate(
        prompt="a red circle left of a blue square", size="64x64", extra_body=EXTRA
    )
    assert picture(found.data[0].b64_json).size == (64, 64)
    assert found.model_extra["model"] == "builtin"


def test_the_same_seed_is_the_same_picture(client):
    body = {**EXTRA, "deterministic": True}
    one, two = (client.images.generate(prompt="a red circle", size="64x64", extra_body=body) for _ in range(2))
    assert one.data[0].b64_json == two.data[0].b64_json


def test_several_pictures_have_following_seeds(client):
    answer = client.images.generate(prompt="a red circle", n=3, size="64x64", extra_body=EXTRA)
    assert [one.model_extra["seed"] for one in answer.data] == [7, 8, 9]
    assert answer.model_extra["calls"]["denoiser"] == 6
    alone = client.images.generate(prompt="a red circle", size="64x64", extra_body={"steps": 2, "seed": 9})
    mine, theirs = picture(answer.data[2].b64_json), picture(alone.data[0].b64_json)
    assert max(abs(a - b) for a, b in zip(mine.tobytes(), theirs.tobytes(), strict=True)) <= 1


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_formats(client, kind):
    answer = client.images.generate(prompt="a", size="64x64", output_format=kind, extra_body=EXTRA)
    assert picture(answer.data[0].b64_json).format == kind.upper()
    assert answer.output_format == kind


@pytest.mark.parametrize(("quality", "preset"), [("high", "exact"), ("auto", "exact"), ("exact", "exact")])
def test_quality_picks_the_preset(client, quality, preset):
    answer = client.images.generate(prompt="a", size="64x64", quality=quality, extra_body=EXTRA)
    assert answer.model_extra["preset"] == preset


def test_url(client, http):
    answer = client.images.generate(prompt="a", size="64x64", response_format="url", extra_body=EXTRA)
    address = answer.data[0].url
    found = http.get(address)
    assert found.status_code == 200
    assert found.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(found.content)).size == (64, 64)
    assert http.get(address.replace("signature=", "signature=0")).status_code == 404


def test_stream_with_partial_images(client):
    client.images.generate(prompt="a", size="64x64", extra_body=EXTRA)  # previews are learned from a first picture
    stream = client.images.generate(
        prompt="a red circle", size="64x64", stream=True, partial_images=2, extra_body={"steps": 6, "seed": 1}
    )
    events = list(stream)
    assert [event.type for event in events] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    assert all(picture(event.b64_json).size == (64, 64) for event in events)
    assert events[-1].model_extra["steps"] == 6


def test_a_stream_of_an_edit_has_as_many_partial_images(client):
    client.images.generate(prompt="a", size="64x64", extra_body=EXTRA)
    asked = {"steps": 8, "seed": 1, "strength": 0.5}
    stream = client.images.edit(
        image=("in.png", png()), prompt="a ring", size="64x64", stream=True, partial_images=2, extra_body=asked
    )
    assert [event.type for event in stream] == ["image_edit.partial_image"] * 2 + ["image_edit.completed"]


def test_a_stream_that_waits_says_that_it_is_there(launch, pipe, gated, wanted, monkeypatch):
    """Proxies cut an answer in which nothing moves, and hold back what does."""
    monkeypatch.setattr("vivace.serve.http.images.SILENCE", 0.1)
    server, gate = launch({"tiny": pipe}), gated(pipe.transformer)
    gate.shut()
    with server.http.stream("POST", "/v1/images/generations", json=wanted | {"stream": True}) as answer:
        assert answer.headers["x-accel-buffering"] == "no"
        said = []
        for line in answer.iter_lines():
            said.append(line)
            if said.count(": waiting") == 3:
                gate.open.set()
    assert "event: image_generation.completed" in said


def test_null_is_not_given(client):
    nothing = {"steps": 1, "seed": None, "lora": None, "negative_prompt": None, "output_compression": None}
    answer = client.images.generate(prompt="a", size="64x64", n=None, quality=None, user=None, extra_body=nothing)
    assert len(answer.data) == 1
    with pytest.raises(openai.BadRequestError, match="unknown field 'stepz'"):
        client.images.generate(prompt="a", extra_body={"stepz": None})
    with pytest.raises(openai.BadRequestError, match="'prompt' is missing"):
        client.images.generate(prompt=None)  # pyright: ignore[reportArgumentType]


def test_edits(client):
    answer = client.images.edit(image=("in.png", png()), prompt="a blue ring", extra_body={**EXTRA, "strength": 0.9})
    assert picture(answer.data[0].b64_json).size == (64, 64)
    assert answer.model_extra["strength"] == 0.9
    assert answer.model_extra["seed"] == 7


def test_edits_with_a_mask(client):
    mask = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (16, 16, 48, 48))
    buffer = io.BytesIO()
    mask.save(buffer, "PNG")
    answer = client.images.edit(
        image=[("in.png", png())], mask=("mask.png", buffer.getvalue()), prompt="a blue ring", extra_body=EXTRA
    )
    assert picture(answer.data[0].b64_json).size == (64, 64)


def test_large_pictures_are_brought_to_size_once_and_hold_nobody_up(client, http, monkeypatch):
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((900, 900)).convert("RGB").save(buffer, "PNG")
    resize, where = Image.Image.resize, []

    def watched(image, *args, **options):
        if image.size == (900, 900):
            with pytest.raises(RuntimeError):
                asyncio.get_running_loop()
            where.append(image.mode)
        return resize(image, *args, **options)

    more = {"steps": "2", "strength": "0.9", "size": "64x64", "n": "3"}
    monkeypatch.setattr(Image.Image, "resize", watched)
    several = http.post(
        "/v1/images/edits", data={"prompt": "a", "seed": "1", **more}, files={"image": buffer.getvalue()}
    )
    assert len(several.json()["data"]) == 3
    assert where == ["RGB"]


def test_a_model_may_go_by_a_hubs_name(launch, pipe):
    server = launch({"some/model": pipe})
    assert server.client.models.retrieve("some/model").id == "some/model"
    assert server.client.images.generate(model="some/model", prompt="a", size="64x64", extra_body=EXTRA).data


def test_models(client):
    assert [(model.id, model.model_extra["media"]) for model in client.models.list()] == [
        ("tiny", "image"),
        ("clip", "video"),
    ]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("other")
    assert error.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"extra_body": {"stepz": 3}}, "stepz", "unknown field"),
        ({"size": "64"}, "size", "size is '64'; give WIDTHxHEIGHT"),
        ({"size": "60x64"}, "size", "nearest is 64x64"),
        ({"n": 11}, "n", "the most is 10"),
        ({"extra_body": {"steps": 151}}, "steps", "the most is 150"),
        ({"extra_body": {"seed": -1}}, "seed", "seed is -1, the least is 0"),
        ({"extra_body": {"seed": "a"}}, "seed", "seed is 'a'; it has to be a whole number"),
        ({"extra_body": {"seed": 2**63}}, "seed", "it has to be less than 9223372036854775808"),
        ({"extra_body": {"steps": 1.5}}, "steps", "steps is 1.5; it has to be a whole number"),
        ({"extra_body": {"guidance_scale": 1e9}}, "guidance_scale", "the most is 100"),
        ({"extra_body": {"true_cfg_scale": 2.0}}, "true_cfg_scale", "does not take"),
        ({"extra_body": {"lora": {"style": 1}}}, "lora", "no LoRA 'style'"),
        ({"extra_body": {"scheduler": "no such"}}, "scheduler", "no scheduler"),
        ({"quality": "best"}, "quality", "no quality 'best'"),
        ({"prompt": ""}, "prompt", "the prompt is empty; say what to draw"),
        ({"prompt": "x" * 8001}, "prompt", "the most is 8000"),
        ({"size": "16384x16384"}, "size", "more than"),
        ({"model": "clip"}, "model", "makes no image"),
        ({"extra_body": {"image_url": "http://127.0.0.1/"}}, "image_url", "unknown field"),
        ({"extra_body": {"output_path": "/tmp/x"}}, "output_path", "unknown field"),
        ({"stream": True, "n": 2}, "n", "one picture"),
        ({"n": True}, "n", "has to be a number"),
        ({"extra_body": {"guidance_scale": False}}, "guidance_scale", "has to be a number"),
        ({"extra_body": {"lora": {"style": True}}}, "lora.style", "has to be a number"),
        ({"extra_body": {"lora": {"style": 1e9}}}, "lora.style", "lora.style is 1000000000.0, the most is 100"),
        ({"extra_body": {"lora": {"{style}": "a"}}}, "lora.{style}", "lora.{style} is 'a'; it has to be a number"),
        ({"background": "transparent"}, "background", "is 'transparent'; it has to be 'auto' or 'opaque'"),
        ({"extra_body": {"deterministic": "maybe"}}, "deterministic", "it has to be true or false"),
        ({"prompt": ["a"]}, "prompt", "prompt is ['a']; it has to be text"),
    ],
)
def test_wrong_requests_are_400_and_named(client, fields, param, said):
    with pytest.raises(openai.BadRequestError) as error:
        client.images.generate(**{"prompt": "a red circle", **fields})
    assert error.value.body["type"] == "invalid_request_error"
    assert error.value.param == param
    assert said in error.value.body["message"]


def test_more_pictures_than_ever_find_room_are_no_full_queue(launch, wanted):
    server = launch({"tiny": FAMILIES["sd3"].tiny()}, engine={"queue": 1, "threads": 2})
    with server.http as http:
        answer = http.post("/v1/images/generations", json=wanted | {"n": 4})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "n"
        assert "room for 3" in answer.json()["error"]["message"]
        assert len(http.post("/v1/images/generations", json=wanted | {"n": 3}).json()["data"]) == 3


def test_unknown_model_is_404(client):
    with pytest.raises(openai.NotFoundError) as error:
        client.images.generate(prompt="a", model="other")
    assert error.value.code == "model_not_found"
    assert error.value.param == "model"


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b'{"prompt": NaN}', b'{"prompt": "a", "guidance_scale": Infinity}', b"[" * 5000]
)
def test_bodies_that_are_no_order(http, body):
    answer = http.post("/v1/images/generations", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_every_answer_has_a_request_id(http):
    ids = {http.get("/livez").headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2
    assert http.get("/nowhere").json()["error"]["type"] == "not_found_error"
    assert http.put("/v1/models").status_code == 405
