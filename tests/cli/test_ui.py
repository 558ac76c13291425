"""`vivace ui` as a process: one command, and the page is there."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
import pytest

from vivace.cli import main

PATIENCE = 240  # seconds, on a machine that does much else


def code_of(*arguments: str) -> object:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return end.value.code


@pytest.mark.timeout(600)
def test_one_command_and_the_page_is_there(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # A screen, and a browser that notes what it was opened with.
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/opened\n')
    browser.chmod(0o755)
    environment = {**os.environ, "DISPLAY": ":0", "BROWSER": f"{browser} %s"}
    # A proxy, which cannot lead to this machine.
    environment |= {"http_proxy": "http://127.0.0.1:1", "no_proxy": ""}
    command = [sys.executable, "-m", "vivace", "ui", "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if line.startswith("vivace: "))
        assert line == f"vivace: http://127.0.0.1:{port}/ui/ (Ctrl-C ends it)\n"
        answer = httpx2.get(f"http://127.0.0.1:{port}/", follow_redirects=True, timeout=PATIENCE)
        assert answer.status_code == 200
        assert "gradio_config" in answer.text
        end = time.monotonic() + PATIENCE
        while not (tmp_path / "opened").exists():
            assert time.monotonic() < end
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=PATIENCE)
        assert "Traceback" not in rest
        assert process.returncode == 0
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("--host", "0.0.0.0"), "--api-key"), (("x=/no/such/model",), "no model at"), (("--lora", "a"), "ALIAS=VALUE")],
)
def test_mistakes_are_one_line(arguments, said, capsys, monkeypatch):
    monkeypatch.delenv("VIVACE_API_KEY", raising=False)
    assert code_of("ui", *arguments) == 2
    text = capsys.readouterr().err
    assert said in text
    assert text.count("\n") == 1


class Other(BaseHTTPRequestHandler):
    """Whoever has the port already, and answers as Vivace does."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def test_another_s_page_is_not_announced(capsys):
    with ThreadingHTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        assert code_of("ui", "--no-open", "--port", str(other.server_port)) == 2
        other.shutdown()
    text = capsys.readouterr().err
    assert f"port {other.server_port} of 127.0.0.1 is taken" in text
    assert text.count("\n") == 1


def test_what_is_missing_is_named():
    code = "import sys; sys.modules['gradio'] = None\nfrom vivace.cli import main\nmain(['ui', 'x=/no/such/model'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2
    assert "pip install -c constraints.txt -e '.[ui]'" in done.stderr
