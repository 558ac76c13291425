"""A hub that is not there, or lacks the model: told in one line, after one try."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest


class Hub(HTTPServer):
    """Answers everything with one status, and counts."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.status, self.said, self.asked = 503, "", 0


class Answer(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        assert isinstance(self.server, Hub)
        self.server.asked += 1
        self.send_response(self.server.status)
        self.send_header("X-Error-Code", self.server.said)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        return None


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def generate(hub: str, home: object, *options: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_ENDPOINT": hub, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "vivace", "generate", "a red circle", *options]
    return subprocess.run(command, env=environment, cwd=str(home), capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("status", "said", "reason"),
    [
        (503, "", "the hub does not answer: "),
        (404, "RepoNotFound", "the hub has no model of that name that you may read"),
        (404, "EntryNotFound", "it has no model_index.json"),
        (403, "GatedRepo", "it is gated"),
    ],
)
def test_one_try_and_one_line(hub, tmp_path, status, said, reason):
    hub.status, hub.said = status, said
    ended = generate(f"http://127.0.0.1:{hub.server_port}", tmp_path, "--model", "models/sdxl")
    assert (ended.returncode, hub.asked) == (2, 1)
    assert ended.stderr.startswith(f"vivace: no folder models/sdxl here, and none from the hub ({reason}")
    assert ended.stderr.endswith("); check name and network\n")
    assert ended.stderr.count("\n") == 1


def test_no_hub_at_all(hub, tmp_path):
    address = f"http://127.0.0.1:{hub.server_port}"
    hub.server_close()
    ended = generate(address, tmp_path, "--model", "models/sdxl")
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "the hub does not answer" in ended.stderr
