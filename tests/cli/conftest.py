"""`vivace serve` in a process of its own, with a gate in front of its denoiser."""

from __future__ import annotations

import contextlib
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from vivace.families import FAMILIES

PATIENCE = 240.0  # seconds for whatever has to happen: other processes may have all the processors

# The command line as it is, but for hooks on the denoiser and the encoding, which do what the files in a folder say.
GATED = """
import sys, time
from pathlib import Path
import torch
from vivace.cli import main
from vivace.serve import model
from vivace.serve.http import images

folder, load, encode = Path(sys.argv.pop(1)), model.load_source, images.encode

def gate(module, args, kwargs):
    (folder / "reached").touch()
    while (folder / "shut").exists():
        time.sleep(0.01)
    if (folder / "lost").exists():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if (folder / "wrong").exists():
        wrong = float((folder / "wrong").read_text())
        if any(abs(at - wrong) < 1e-3 for at in kwargs["timestep"].tolist()):
            raise RuntimeError("a secret of the inside")

def loaded(*args, **kwargs):
    # In native code, as a load is.
    while (folder / "loading").exists():
        torch.rand(1_000_000).sort()
    pipe = load(*args, **kwargs)
    pipe.transformer.register_forward_pre_hook(gate, with_kwargs=True)
    return pipe

def encoded(*args):
    if (folder / "slow").exists():
        time.sleep(float((folder / "slow").read_text()))
    return encode(*args)

model.load_source, images.encode = loaded, encoded
main(sys.argv[1:])
"""


class Process:
    """A running `vivace serve`, with its log."""

    def __init__(self, *arguments: str, gate: Path) -> None:
        self.gate = gate
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-c", GATED, str(gate), "serve", *arguments, "--port", str(self.port)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.http = httpx2.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=PATIENCE)
        self.client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=PATIENCE
        )

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.lines.append(line)

    def shut(self) -> None:
        """From now on calls of the denoiser wait."""
        (self.gate / "reached").unlink(missing_ok=True)
        (self.gate / "shut").touch()

    def open(self) -> None:
        (self.gate / "shut").unlink(missing_ok=True)

    def reached(self) -> None:
        """Wait for a call of the denoiser."""
        self.until((self.gate / "reached").exists)

    def until(self, holds: Callable[[], Any]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not holds():
            assert time.monotonic() < deadline, self.lines
            time.sleep(0.02)

    def counts(self, **expected: float) -> bool:
        """Whether /metrics says so now: `counts(running=1)`."""
        text = self.http.get("/metrics").text
        return all(f"vivace_{name} {value:.1f}\n" in text for name, value in expected.items())

    def ready(self) -> int | None:
        """What /readyz answers; None where nobody does."""
        with contextlib.suppress(httpx2.TransportError):
            return self.http.get("/readyz").status_code
        return None

    def wait_ready(self) -> None:
        def is_ready() -> bool:
            assert self.process.poll() is None, self.lines
            return self.ready() == 200

        self.until(is_ready)

    def ask(self, **fields: Any) -> Asking:
        """A picture, asked for from another thread."""
        return Asking(self, fields)

    def wait(self, timeout: float = PATIENCE) -> int:
        """The exit code, once it has ended by itself."""
        code = self.process.wait(timeout)
        self._reader.join(10)
        return code


class Asking:
    """An order of a small picture on its way."""

    def __init__(self, server: Process, fields: dict[str, Any]) -> None:
        self.answer: httpx2.Response | None = None  # None too where the server went away
        body = {"prompt": "a red circle", "size": "64x64", "steps": 3, "seed": 1, **fields}
        self._thread = threading.Thread(target=self._ask, args=(server, body), daemon=True)
        self._thread.start()

    def _ask(self, server: Process, body: dict[str, Any]) -> None:
        with contextlib.suppress(httpx2.TransportError):
            self.answer = httpx2.post(f"{server.http.base_url}/v1/images/generations", json=body, timeout=PATIENCE)

    def result(self) -> httpx2.Response | None:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        return self.answer


@pytest.fixture(autouse=True)
def log() -> Iterator[None]:
    """The log of this process stays the tests': `vivace serve` takes it over, with a stream that ends with a test."""
    loggers = [logging.getLogger(name) for name in (None, "vivace", "uvicorn", "uvicorn.error", "uvicorn.access")]
    before = [(one, one.handlers[:], one.level, one.propagate) for one in loggers]
    yield
    for one, handlers, level, propagate in before:
        one.handlers[:], one.propagate = handlers, propagate
        one.setLevel(level)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models on disk, as anyone has them."""
    found = {}
    for alias, family in (("tiny", "sd3"), ("clip", "wan")):
        found[alias] = tmp_path_factory.mktemp(alias)
        FAMILIES[family].tiny().save_pretrained(found[alias])
    return found


@pytest.fixture(scope="module")
def launch(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Process]]:
    """Starts `vivace serve` with some of the models; whatever is left at the end is killed."""
    started: list[Process] = []

    def start(*aliases: str, options: tuple[str, ...] = (), loading: bool = False) -> Process:
        """With `loading` it is given back while it loads, which it then does until it is killed."""
        models = (f"{alias}={folders[alias]}" for alias in aliases)
        gate = tmp_path_factory.mktemp("gate")
        if loading:
            (gate / "loading").touch()
        process = Process(*models, *options, gate=gate)
        started.append(process)
        if loading:
            process.until(lambda: process.ready() == 503)
        else:
            process.wait_ready()
        return process

    yield start
    for process in started:
        if process.process.poll() is None:
            process.process.kill()
            process.process.wait(10)
