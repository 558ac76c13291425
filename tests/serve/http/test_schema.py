"""The server against its own description: whatever is made of it, no answer is a 5xx, and errors are envelopes."""

from contextlib import suppress

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable

from vivace.families import FAMILIES

SMALL = {"most_pixels": 64 * 64, "most_video_pixels": 64 * 64 * 5, "most_steps": 2, "most_frames": 5}
FORMS = ("POST /v1/images/edits", "POST /v1/videos")
OPEN = ("/livez", "/readyz", "/metrics", "/v1/models", "/v1/videos")


@pytest.fixture(scope="module")
def api(launch_module):
    models = {"tiny": FAMILIES["sd3"].tiny(), "clip": FAMILIES["wan"].tiny()}
    server = launch_module(models, engine={"queue": 256}, **SMALL)
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.value)
def test_no_answer_is_a_server_error(api, mode):
    operations = [found.ok() for found in api.get_all_operations()]
    assert len(operations) > 10
    for operation in operations:
        # schemathesis 4.32 cannot make a wrong form with a file in it; test_guard has such by hand.
        if mode is schemathesis.GenerationMode.NEGATIVE and operation.label in FORMS:
            continue
        _try(operation.as_strategy(generation_mode=mode))


def _try(strategy) -> None:
    @given(case=strategy)
    @settings(
        max_examples=15,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def answers(case):
        answer = case.call(timeout=60)
        assert answer.status_code < 500, (case.as_curl_command(), answer.text)
        if answer.status_code >= 400:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    with suppress(Unsatisfiable):  # a route that takes nothing can be given nothing wrong
        answers()


def test_the_description_names_every_route(http):
    described = http.get("/openapi.json").json()["paths"]
    assert set(described) >= {*OPEN, "/v1/images/generations", "/v1/images/edits", "/v1/videos/{video_id}/content"}
    body = described["/v1/images/generations"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["additionalProperties"] is False
    assert {"seed", "steps", "guidance_scale", "negative_prompt", "lora"} <= set(body["properties"])


def test_the_description_has_the_bounds_as_json_schema_spells_them(http):
    described = http.get("/openapi.json").text
    assert not [word for word in ('"ge":', '"le":', '"gt":', '"lt":') if word in described]
    assert '"minimum":' in described


@pytest.mark.parametrize("name", ["prompt", "negative_prompt", "steps", "n", "frames", "batch_size"])
def test_what_the_description_allows_at_most_is_taken_and_no_more(launch, pipe, name):
    most = {"most_prompt": 50, "most_steps": 2, "most_frames": 5, "most_pictures": 2}
    clip = FAMILIES["wan"].tiny()
    http = launch({"tiny": pipe, "clip": clip}, a1111=True, **most).http
    described = http.get("/openapi.json").json()["paths"]
    path = {"frames": "/v1/videos", "batch_size": "/sdapi/v1/txt2img"}.get(name, "/v1/images/generations")
    body = described[path]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"][name]
    (limit,) = [one[word] for one in body.get("anyOf", [body]) for word in ("maximum", "maxLength") if word in one]
    size = {"width": 64, "height": 64} if name == "batch_size" else {"size": "64x64"}
    for value, taken in ((limit, True), (limit + 1, False)):
        fields = {"prompt": "a", "steps": 1, **size, name: "a" * value if "prompt" in name else value}
        answer = http.post(path, json=fields)
        assert (answer.status_code == 200) is taken, answer.text


def test_the_description_knows_the_envelope_and_no_422(http):
    answers = [one["responses"] for path in http.get("/openapi.json").json()["paths"].values() for one in path.values()]
    assert not [found for found in answers if "422" in found]
    for found in answers:
        error = found["default"]["content"]["application/json"]["schema"]["properties"]["error"]
        assert set(error["properties"]) == {"message", "type", "param", "code"}
