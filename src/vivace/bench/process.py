"""A child process that cannot outlive its time: it and everything it started ends at the limit."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

TAIL = 2000  # characters of the child's last words that are kept


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a child ended. `code` is None where its time ran out."""

    code: int | None
    said: str  # the end of its output and errors


def run_module(module: str, arguments: Sequence[str], *, seconds: float) -> Ended:
    """`python -m module arguments` with compilers' caches of its own, all empty, for at most `seconds`."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as caches:
        environment = {
            **os.environ,
            "TRITON_CACHE_DIR": f"{caches}/triton",
            "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor",
            "TOKENIZERS_PARALLELISM": "false",
        }
        return _run([sys.executable, "-m", module, *arguments], environment, Path(caches) / "output", seconds)


def _run(command: Sequence[str], environment: Mapping[str, str], output: Path, seconds: float) -> Ended:
    code: int | None = None
    with output.open("wb") as file:
        # A session of its own, so that the compilers it starts can be ended with it.
        child = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
        try:
            code = child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            _end(child)
    return Ended(code=code, said=output.read_bytes()[-TAIL:].decode(errors="replace"))


def _end(child: subprocess.Popen) -> None:
    """Kill the child's whole session; what has ended already is no error."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
