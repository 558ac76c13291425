"""`vivace serve` as a process: it starts, draws, and ends as it should."""

import importlib.util
import json
import signal
import socket
import subprocess
import sys

import openai
import pytest

from vivace.cli import main

SMALL = {"size": "64x64", "extra_body": {"steps": 2, "seed": 1}}


def code_of(*arguments: str) -> object:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return end.value.code


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--host", "0.0.0.0"), "--api-key"),
        (("--api-key", "short"), "16 characters"),
        (("sdxl",), "ALIAS=VALUE"),
        (("x=/no/such/model",), "no model at"),
        (("--lora", "style"), "ALIAS=VALUE"),
        (("--lora", "style=/no/such"), "no weight file /no/such"),
        (("x=builtin", "x=/other"), "x was given twice, for builtin and /other"),
        (("--port", "99999"), "less than or equal to 65535"),
        (("--device", "cuda:99"), "no device cuda:99"),
        (("--device", "gpu"), "no device 'gpu'"),
        (("--dtype", "float99"), "no dtype 'float99'"),
        (("--preset", "fsat"), "unknown preset 'fsat'"),
        (("--memory", "0"), "memory: Input should be greater than 0, got 0.0"),
        (("--parked", "inf"), "parked: Input should be a finite number, got inf"),
        (("--allowed-host", "https://draw.example.com/"), "is no name of a host"),
        (("--allowed-host", "draw.example.com:443"), "is no name of a host"),
        (("--folder", "/dev/null"), "/dev/null cannot be a folder of videos"),
        (("--host", "no such host", "--api-key", "0123456789abcdef"), "no such host is no address"),
        (("--api-key", "a key with some spaces in it"), "no header carries"),
        (("--replicas", "2"), "--replicas needs --ray"),
        (("--ray", "--replicas", "2-x"), "--replicas '2-x'"),
        (("--ray", "--replicas", "4-2"), "max_replicas is 2"),
        (("--ray", "--host", "0.0.0.0"), "--api-key"),
    ],
)
def test_mistakes_are_one_line(arguments, said, capsys):
    assert code_of("serve", *arguments) == 2
    text = capsys.readouterr().err
    assert said in text
    assert text.count("\n") == 1


def test_what_is_missing_is_named():
    code = "import sys; sys.modules['uvicorn'] = None\nfrom vivace.cli import main\nmain(['serve', 'x=/no/such/model'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "pip install -c constraints.txt -e '.[serve]'" in done.stderr


def test_code_that_comes_with_models_is_off_before_diffusers_is_there():
    """It reads the switch once, when it is imported."""
    said = "from diffusers.utils import constants; print(constants.DIFFUSERS_DISABLE_REMOTE_CODE)"
    code = f"from vivace.cli.serve import planned; planned(None, None, ui=False); {said}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "True", done.stderr


def test_a_port_that_is_taken_is_said_in_one_line(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert code_of("serve", "--port", str(port)) == 2
    text = capsys.readouterr().err
    assert f"port {port} of 127.0.0.1 is taken" in text
    assert text.count("\n") == 1


@pytest.mark.timeout(600)
def test_it_draws_and_ends_after_what_runs(launch):
    server = launch("tiny")
    assert server.client.images.generate(prompt="a red circle", **SMALL).data[0].b64_json
    metrics = server.http.get("/metrics").text
    assert 'vivace_job_seconds_count{model="tiny",outcome="done"} 1.0' in metrics
    assert "vivace_call_requests_bucket" in metrics
    server.shut()
    asking = server.ask()
    server.reached()
    server.process.send_signal(signal.SIGTERM)
    server.until(lambda: server.ready() == 503)
    with pytest.raises(openai.InternalServerError) as error:
        server.client.images.generate(prompt="a", **SMALL)
    assert error.value.status_code == 503
    assert error.value.code == "unavailable"
    server.open()
    assert asking.result().json()["data"][0]["b64_json"]
    assert server.wait() == 0
    records = [json.loads(line) for line in server.lines]  # what the libraries say included
    asked = [one for one in records if one["logger"] == "vivace.serve.access" and "images" in one["route"]]
    assert sorted(one["status"] for one in asked) == [200, 200, 503]
    assert all(len(one["request_id"]) == 16 for one in asked)
    assert "Traceback" not in "".join(server.lines)


@pytest.mark.timeout(600)
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra [ray]")
def test_on_ray_it_ends_after_what_runs_too(launch):
    server = launch("tiny", options=("--ray", "--gpus", "0", "--replicas", "1-2"))
    asking = server.ask(steps=150)
    server.until(lambda: server.counts(running=1))
    server.process.send_signal(signal.SIGTERM)
    assert asking.result().json()["data"][0]["b64_json"]
    assert server.wait() == 0
    assert "Traceback" not in "".join(server.lines)
