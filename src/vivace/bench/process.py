"""Child processes that cannot outlive their time: each, and everything it started, ends at its limit."""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

TAIL = 8000  # characters of the child's last words that are kept


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a child ended. `code` is None where its time ran out."""

    code: int | None
    said: str  # the end of its output and errors


class Children:
    """Runs of `python -m module`, one after the other, each in a process of its own with compilers' caches of its own.

    Processes are started `together`, as many as that, and import what models need; each then waits for its arguments.
    The first has them when all are ready: whoever is measured has no neighbour, and a run in a few waits for imports.
    Use as a context manager, which ends those that wait.
    """

    def __init__(self, module: str, *, together: int = 1) -> None:
        self.module, self.together = module, together
        self.waiting: list[_Child] = []

    def run(self, arguments: Sequence[str], *, seconds: float) -> Ended:
        """One of them, for at most `seconds` from when it has its arguments."""
        if not self.waiting:
            self.waiting += [_Child(self.module) for _ in range(self.together)]
            for child in self.waiting:
                child.wait_until_ready()
        with contextlib.closing(self.waiting.pop(0)) as child:
            child.begin(arguments)
            return child.wait(seconds)

    def __enter__(self) -> Children:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        while self.waiting:
            self.waiting.pop().close()


class _Child:
    """A process that waits for its arguments."""

    def __init__(self, module: str) -> None:
        self._scratch = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        folder = Path(self._scratch.name)
        self._output, self._ready = folder / "output", folder / "ready"
        environment = {
            **os.environ,
            "TRITON_CACHE_DIR": f"{folder}/triton",
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [sys.executable, "-m", __name__, module, str(self._ready)]
        with self._output.open("wb") as file:
            # A session of its own, so that the compilers it starts can be ended with it.
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=file, stderr=file, start_new_session=True
            )

    def wait_until_ready(self) -> None:
        """Until it has imported everything, or has ended."""
        while not self._ready.exists() and self._process.poll() is None:
            time.sleep(0.02)

    def begin(self, arguments: Sequence[str]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # one that has ended already says so in its output
            self._process.stdin.write(json.dumps(list(arguments)).encode())
            self._process.stdin.close()

    def wait(self, seconds: float) -> Ended:
        code: int | None = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(timeout=seconds)
        return Ended(code=code, said=self._output.read_bytes()[-TAIL:].decode(errors="replace"))

    def close(self) -> None:
        """Kill the process's whole session; what has ended already is no error."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._scratch.cleanup()


def main(module: str, ready: str) -> None:
    """Import what models need, say so, wait for the arguments, and be `python -m module` with them."""
    _import()
    Path(ready).touch()
    arguments = sys.stdin.read()
    if arguments:  # else nobody is there any more
        sys.argv = [module, *json.loads(arguments)]
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def _import() -> None:
    from diffusers import AutoencoderKL, DiffusionPipeline  # noqa: F401
    from transformers import CLIPTextModel, T5EncoderModel  # noqa: F401


if __name__ == "__main__":
    main(*sys.argv[1:])
