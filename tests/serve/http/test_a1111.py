"""The A1111 routes: only where they are asked for, and only what is harmless."""

import base64
import gc
import io
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image
from safetensors.torch import save_file
from starlette.requests import Request

from vivace.families import FAMILIES
from vivace.serve import Spec
from vivace.serve.http.a1111 import Img2Img

ORDER = {"prompt": "a red circle", "steps": 2, "width": 64, "height": 64, "seed": 5}


@pytest.fixture
def server(launch, pipe):
    return launch({"tiny": pipe}, a1111=True)


def test_off_by_default(http):
    assert http.post("/sdapi/v1/txt2img", json=ORDER).status_code == 404


def picture(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_pictures_from_text_and_from_pictures(server):
    with server.http as http:
        found = http.post("/sdapi/v1/txt2img", json=ORDER | {"batch_size": 2, "sampler_name": "Euler"}).json()
        assert [picture(one).size for one in found["images"]] == [(64, 64)] * 2
        assert json.loads(found["info"])["all_seeds"] == [5, 6]
        again = ORDER | {"init_images": [f"data:image/png;base64,{found['images'][0]}"], "denoising_strength": 0.9}
        edited = http.post("/sdapi/v1/img2img", json=again).json()
        assert picture(edited["images"][0]).size == (64, 64)
        assert json.loads(edited["info"])["strength"] == 0.9
        assert [one["title"] for one in http.get("/sdapi/v1/sd-models").json()] == ["tiny"]
        assert "Euler" in [one["name"] for one in http.get("/sdapi/v1/samplers").json()]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"override_settings": {"sd_model_checkpoint": "x"}}, "override_settings"),
        ({"alwayson_scripts": {"x": {}}}, "alwayson_scripts"),
        ({"script_name": "x"}, "script_name"),
        ({"styles": ["x"]}, "styles"),
        ({"enable_hr": True}, "enable_hr"),
        ({"subseed_strength": 0.5}, "subseed_strength"),
        ({"steps": 1000}, "steps"),
        ({"width": 16384, "height": 16384}, "width"),
        ({"width": 60}, "width"),
        ({"sampler_name": "DDIM"}, "sampler_name"),
        ({"batch_size": 11}, "batch_size"),
        ({"batch_size": True}, "batch_size"),
        ({"height": None}, "width"),
        ({"sampler_name": "best"}, "sampler_name"),
        ({"prompt": "a <lora:other:1>"}, "prompt"),
        ({"prompt": "a <lora:style:1:0.5>"}, "prompt"),
        ({"prompt": "a <lora:style:1> <lora:style:1>"}, "prompt"),
        ({"prompt": "a <lora:style:much>"}, "prompt"),
        ({"prompt": "<lora:style:1>"}, "prompt"),
    ],
)
def test_what_is_refused(server, fields, param):
    answer = server.http.post("/sdapi/v1/txt2img", json=ORDER | fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert "after validation" not in answer.text


@pytest.mark.parametrize("image", ["http://127.0.0.1/x.png", "/etc/passwd", "data:image/png;base64,%%", "AAAA"])
def test_pictures_come_as_base64_alone(server, image):
    answer = server.http.post("/sdapi/v1/img2img", json=ORDER | {"init_images": [image]})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_image"


def test_pictures_may_be_as_large_as_in_a_form(server):
    noise, file = Image.effect_noise((1024, 1024), 100), io.BytesIO()
    noise.save(file, "PNG", compress_level=0)
    coded = base64.b64encode(file.getvalue()).decode()
    assert len(coded) > 1_000_000
    with server.http as http:
        answer = http.post("/sdapi/v1/img2img", json=ORDER | {"init_images": [coded], "denoising_strength": 0.9})
        assert picture(answer.json()["images"][0]).size == (64, 64)
        assert http.post("/sdapi/v1/txt2img", json=ORDER | {"init_images": [coded]}).status_code == 413


def test_nothing_holds_a_picture_as_it_came_while_it_waits(server, pipe, gated):
    gate, file = gated(pipe.transformer), io.BytesIO()
    gate.shut()
    Image.new("RGB", (64, 64), "red").save(file, "PNG")
    order = ORDER | {"init_images": [base64.b64encode(file.getvalue()).decode()], "denoising_strength": 0.9}
    with server.http as http, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(http.post, "/sdapi/v1/img2img", json=order)
        assert gate.reached.wait(120)
        gc.collect()
        found = gc.get_objects()
        read = [one for one in found if isinstance(one, Img2Img)]
        bodies = [one for one in found if isinstance(one, Request) and hasattr(one, "_body")]
        gate.open.set()
        assert answer.result().status_code == 200
    assert not read
    assert not bodies


def test_progress_and_interrupt(server, pipe, gated):
    gate, answers = gated(pipe.transformer), []
    gate.shut()

    def ask():
        answers.append(server.http.post("/sdapi/v1/txt2img", json=ORDER | {"steps": 50}))

    asking = threading.Thread(target=ask)
    asking.start()
    assert gate.reached.wait(120)
    found = server.http.get("/sdapi/v1/progress").json()
    assert found["state"]["job_count"] == 1
    assert found["progress"] < 1
    assert server.http.post("/sdapi/v1/interrupt", json={}).status_code == 200
    gate.open.set()
    asking.join(20)
    assert answers[0].status_code == 499
    deadline = time.monotonic() + 120
    while server.engine.running and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server.http.get("/sdapi/v1/progress").json()["state"]["job_count"] == 0


def test_interrupt_passes_a_full_queue(launch, pipe, gated):
    server, gate = launch({"tiny": pipe}, a1111=True, engine={"queue": 1, "threads": 1}), gated(pipe.transformer)
    gate.shut()
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(server.http.post, "/sdapi/v1/txt2img", json=ORDER) for _ in range(2)]
        deadline = time.monotonic() + 120
        while server.engine.queued < 1 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert server.http.post("/sdapi/v1/txt2img", json=ORDER).status_code == 429
        assert server.http.post("/sdapi/v1/interrupt").status_code == 200
        gate.open.set()
        assert [one.result(60).status_code for one in asked] == [499, 499]


def test_what_clients_send_as_a_matter_of_course(launch, pipe):
    """Desktop clients send every field that they know, with the value that asks for nothing."""
    server = launch({"clip": FAMILIES["wan"].tiny(), "tiny": pipe}, a1111=True)
    idle = {"restore_faces": False, "tiling": False, "enable_hr": False, "styles": [], "n_iter": 1, "subseed": -1}
    idle |= {"subseed_strength": 0, "do_not_save_samples": True, "do_not_save_grid": False}
    with server.http as http:
        made = http.post("/sdapi/v1/txt2img", json=ORDER | idle)
        assert made.json()["images"] == http.post("/sdapi/v1/txt2img", json=ORDER).json()["images"]
        edit = ORDER | idle | {"init_images": made.json()["images"], "resize_mode": 0, "include_init_images": False}
        assert http.post("/sdapi/v1/img2img", json=edit).status_code == 200
        assert http.get("/sdapi/v1/options").json() == {"sd_model_checkpoint": "tiny"}
        assert [one["title"] for one in http.get("/sdapi/v1/sd-models").json()] == ["tiny"]


def test_prompts_name_loras(launch, pipe, lora_of, tmp_path):
    save_file(lora_of(pipe.transformer), tmp_path / "style.safetensors")
    server = launch({"tiny": Spec(source=pipe, loras={"style": tmp_path / "style.safetensors"})}, a1111=True)
    same = {"steps": 2, "size": "64x64", "seed": 5}
    with server.http as http:
        assert [one["name"] for one in http.get("/sdapi/v1/loras").json()] == ["style"]
        for text, weight in (("<lora:style:0.5>", 0.5), ("<lora:style>", 1.0)):
            found = http.post("/sdapi/v1/txt2img", json=ORDER | {"prompt": f"a red circle {text}"}).json()
            assert json.loads(found["info"])["lora"] == {"style": weight}
            other = same | {"prompt": "a red circle", "lora": {"style": weight}}
            (entry,) = http.post("/v1/images/generations", json=other).json()["data"]
            assert found["images"] == [entry["b64_json"]]


def test_null_is_not_given(server):
    nothing = {"negative_prompt": None, "sampler_name": None, "override_settings": None}
    with server.http as http:
        assert http.post("/sdapi/v1/txt2img", json={**ORDER, **nothing}).status_code == 200
        assert http.post("/sdapi/v1/txt2img", json={**ORDER, "script_name": None}).status_code == 400
