"""From the page's fields to a request: through the API's limits, whatever the fields hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
from PIL import Image

from vivace.errors import InputError
from vivace.families import FAMILIES
from vivace.serve.http.envelope import ApiError, api_error
from vivace.serve.model import Model, Spec
from vivace.serve.ui.form import Form, restored, sizes, takes
from vivace.serve.ui.inputs import Input, Inputs

PLAIN = {
    "prompt": "a red circle", "negative": "", "model": "tiny", "size": "64x64", "steps": 3, "guidance": 4.0,
    "seed": "", "preset": "exact", "cache": "none", "lora": [], "strength": 0.6, "edit": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def server(launch):
    models = {"tiny": FAMILIES["sd3"].tiny(), "plain": FAMILIES["pixart"].tiny(), "clip": FAMILIES["wan"].tiny()}
    return launch(models).app.state.server


@pytest.fixture
def inputs():
    return Inputs(seconds=60, most_bytes=10**7)


def request(server, inputs, **fields):
    return Form(**{**PLAIN, **fields}).request(server, inputs)


def test_a_request(server, inputs):
    found = request(server, inputs, seed=" 7 ", negative="blue", size="64 × 128")
    assert (found.prompt, found.negative, found.seed, found.size) == ("a red circle", "blue", 7, (64, 128))
    assert (found.steps, found.guidance, found.quality, found.cache) == (3, 4.0, "exact", "none")
    assert found.strength is None
    assert found.previews == 10
    assert found.queue_seconds == server.settings.queue_seconds
    assert request(server, inputs).seed is None


def test_an_edit_keeps_its_picture_s_shape(server, inputs):
    mask = Image.new("L", (96, 64), 255)
    edit = {"id": inputs.add(Input(Image.new("RGB", (96, 64)), mask))}
    found = request(server, inputs, edit=edit)
    assert found.images[0].size == (96, 64)
    assert (found.mask, found.strength, found.size) == (mask, 0.6, None)


def test_a_model_gets_only_what_it_takes(server, inputs):
    found = request(server, inputs, model="plain", negative="blue")
    assert found.negative == "blue"
    edit = {"id": inputs.add(Input(Image.new("RGB", (64, 64)), None))}
    found = request(server, inputs, model="plain", edit=edit)
    assert (found.images, found.strength, found.size) == ((), None, (64, 64))


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x" * 8001}, "prompt"),
        ({"prompt": ["x"]}, "prompt"),
        ({"steps": 151}, "steps"),
        ({"steps": None, "seed": "seven"}, "seed"),
        ({"seed": -1}, "seed"),
        ({"size": "9999x99999"}, "size"),
        ({"size": "huge"}, "size"),
        ({"size": {"a": 1}}, "size"),
        ({"model": "clip"}, "model"),
        ({"model": "other"}, "model"),
        ({"preset": "best"}, "quality"),
        ({"guidance": float("nan")}, "guidance_scale"),
        ({"lora": [["a", float("inf")]]}, "lora.a"),
        ({"lora": [["a", 1], ["b", "strong"]]}, "lora.b"),
        ({"edit": {"id": "x"}}, "image"),
        ({"edit": {"error": "too large"}}, "image"),
    ],
)
def test_mistakes_name_their_field(server, inputs, fields, field):
    with pytest.raises((ApiError, InputError)) as found:
        request(server, inputs, **fields)
    assert api_error(found.value).param == field


@pytest.mark.parametrize("cache", ["/etc/passwd", "file=/x", "x.yaml"])
def test_a_cache_is_no_file(server, inputs, cache):
    with pytest.raises(InputError, match="name and values"):
        request(server, inputs, cache=cache)


def test_an_earlier_picture_s_fields(server):
    form = Form(**{**PLAIN, "edit": {"id": "x"}})
    plain = form.plain(seed=5)
    assert plain["seed"] == "5"
    assert "edit" not in restored(plain, server)
    assert restored(plain, server)["prompt"] == "a red circle"
    # From a browser's memory: of another server, or of anything.
    odd = restored(
        {**plain, "model": "gone", "preset": "best", "cache": "odd", "lora": [["gone", 1]], "more": 1}, server
    )
    assert not {"model", "preset", "cache", "more"} & odd.keys()
    assert odd["lora"] == []
    assert not restored({"model": [], "preset": {}, "cache": [1]}, server)
    assert restored("odd", server) == restored(None, server) == {}


def test_every_lora_has_its_weight(server, inputs, monkeypatch, tmp_path):
    spec = server.engine.models["tiny"].spec
    loras = {"ink": tmp_path / "ink.safetensors", "lace": tmp_path / "lace.safetensors"}
    monkeypatch.setattr(server.engine.models["tiny"], "spec", replace(spec, loras=loras))
    pairs = [["ink", 0.5], ["lace", -1.25]]
    assert request(server, inputs, lora=pairs).lora == {"ink": 0.5, "lace": -1.25}
    assert request(server, inputs, lora=["ink", ["lace"], 3, ["a", "b", "c"]]).lora == {}
    assert restored(Form(**{**PLAIN, "lora": [*pairs, ["gone", 1]]}).plain(seed=1), server)["lora"] == pairs


def test_sizes_fit_the_model(server):
    for model in server.engine.models.values():
        for size in sizes(model):
            width, height = map(int, size.split("x"))
            assert width % model.source.family.multiple == height % model.source.family.multiple == 0


@pytest.mark.parametrize(("name", "few_step", "shown"), [("builtin", False, True), ("builtin", True, False)])
def test_a_negative_prompt_is_asked_for_where_it_is_heard(name, few_step, shown):
    assert takes(Model(name, Spec(source=name, few_step=few_step)), "negative") == shown


def test_a_negative_prompt_is_not_asked_for_where_only_true_guidance_hears_it():
    assert not takes(Model("flux", Spec(source=FAMILIES["flux"].tiny())), "negative")
