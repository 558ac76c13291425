"""`vivace serve` as a process: it starts, draws, and ends as it should."""

import contextlib
import importlib.util
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import openai
import pytest

from vivace.cli import main
from vivace.families import FAMILIES

SMALL = {"size": "64x64", "extra_body": {"steps": 2, "seed": 1}}
LONG = {"size": "64x64", "extra_body": {"steps": 150, "frames": 33}}


def code_of(*arguments: str) -> object:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return end.value.code


class Process:
    """A running `vivace serve`, with its log."""

    def __init__(self, *arguments: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "vivace", "serve", *arguments, "--port", str(self.port)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.http = httpx2.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0)

    def _read(self) -> None:
        assert self.process.stderr
        self.lines += self.process.stderr

    def ready(self) -> int | None:
        with contextlib.suppress(httpx2.TransportError):
            return self.http.get("/readyz").status_code
        return None

    def wait_ready(self) -> None:
        deadline = time.monotonic() + 240
        while self.ready() != 200:
            assert self.process.poll() is None, self.lines
            assert time.monotonic() < deadline, self.lines
            time.sleep(0.1)

    def wait(self, timeout: float = 30) -> int:
        code = self.process.wait(timeout)
        self._reader.join(5)
        return code


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Two models on disk, as anyone has them."""
    found = {}
    for alias, family in (("tiny", "sd3"), ("clip", "wan")):
        found[alias] = tmp_path_factory.mktemp(alias)
        FAMILIES[family].tiny().save_pretrained(found[alias])
    return found


@pytest.fixture
def launch(folders):
    """Starts `vivace serve` with some of the models; whatever is left is killed."""
    started = []

    def start(*aliases: str, options: tuple[str, ...] = ()) -> Process:
        process = Process(*(f"{alias}={folders[alias]}" for alias in aliases), *options)
        started.append(process)
        process.wait_ready()
        return process

    yield start
    for process in started:
        if process.process.poll() is None:
            process.process.kill()
            process.process.wait(10)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--host", "0.0.0.0"), "--api-key"),
        (("--api-key", "short"), "16 characters"),
        (("sdxl",), "ALIAS=VALUE"),
        (("x=/no/such/model",), "no model at"),
        (("--lora", "style"), "ALIAS=VALUE"),
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
    assert "pip install 'vivace[serve]'" in done.stderr


def test_it_draws_and_ends_after_what_runs(launch):
    server = launch("tiny")
    assert server.client.images.generate(prompt="a red circle", **SMALL).data[0].b64_json
    metrics = server.http.get("/metrics").text
    assert 'vivace_job_seconds_count{model="tiny",outcome="done"} 1.0' in metrics
    assert "vivace_call_requests_bucket" in metrics
    answers = []
    body = {"size": "64x64", "extra_body": {"steps": 150, "seed": 1}}
    asking = threading.Thread(target=lambda: answers.append(server.client.images.generate(prompt="a", **body)))
    asking.start()
    _until(lambda: "vivace_running 1.0" in server.http.get("/metrics").text)
    server.process.send_signal(signal.SIGTERM)
    _until(lambda: server.ready() in (503, None))
    with contextlib.suppress(openai.APIConnectionError):
        with pytest.raises(openai.InternalServerError) as error:
            server.client.images.generate(prompt="a", **SMALL)
        assert error.value.status_code == 503
    asking.join(60)
    assert answers[0].data[0].b64_json
    assert server.wait() == 0
    records = [json.loads(line) for line in server.lines if line.startswith("{")]
    asked = [one for one in records if one["logger"] == "vivace.serve.access" and "images" in one["route"]]
    assert [one["status"] for one in asked if one["status"] != 503] == [200, 200]
    assert all(len(one["request_id"]) == 16 for one in asked)
    assert "Traceback" not in "".join(server.lines)


@pytest.mark.timeout(600)
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra [ray]")
def test_on_ray_it_ends_after_what_runs_too(launch):
    server = launch("tiny", options=("--ray", "--gpus", "0", "--replicas", "1-2"))
    answers = []
    body = {"size": "64x64", "extra_body": {"steps": 150, "seed": 1}}
    asking = threading.Thread(target=lambda: answers.append(server.client.images.generate(prompt="a", **body)))
    asking.start()
    _until(lambda: "vivace_running 1.0" in server.http.get("/metrics").text)
    server.process.send_signal(signal.SIGTERM)
    asking.join(120)
    assert answers[0].data[0].b64_json
    assert server.wait(120) == 0
    assert "Traceback" not in "".join(server.lines)


def test_after_kill_9_the_list_tells_the_truth(launch, tmp_path):
    options = ("--folder", str(tmp_path))
    server = launch("clip", options=options)
    short = {"size": "64x64", "extra_body": {"steps": 1, "frames": 5}}
    done = server.client.videos.create(prompt="a", **short).id
    _until(lambda: server.client.videos.retrieve(done).status == "completed")
    running = [server.client.videos.create(prompt="a", **LONG).id for _ in range(2)]
    _until(lambda: server.client.videos.retrieve(running[0]).status == "in_progress")
    server.process.kill()
    server.wait()
    again = launch("clip", options=options)
    found = {video.id: video for video in again.client.videos.list()}
    assert found[done].status == "completed"
    assert again.client.videos.download_content(done).read()[4:8] == b"ftyp"
    for name in running:
        assert found[name].status == "failed"
        assert found[name].error.code == "server_restarted"
    assert not list(tmp_path.glob(".*"))
    # And a second signal ends it at once, whatever runs.
    again.client.videos.create(prompt="a", **LONG)
    _until(lambda: "vivace_running 1.0" in again.http.get("/metrics").text)
    again.process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    started = time.monotonic()
    again.process.send_signal(signal.SIGTERM)
    assert again.wait() == 128 + signal.SIGTERM
    assert time.monotonic() - started < 3


def _until(holds, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)
