"""A server in processes of its own, as a user starts it, of which none runs while nobody asks it.

Waiting is not enough: Ray's processes look for work all the time, which on two cores is felt by whoever is measured.
"""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil

from vivace.errors import InputError

GRACE = 60.0  # seconds in which a server and all that it started end by themselves


@dataclass(kw_only=True)
class Child:
    """A server with everything that it started; it can stand still while others are asked."""

    url: str
    process: psutil.Popen
    cold_s: float = 0.0  # from its command to its first picture, once that is known

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Let it run inside the block."""
        _each(self._tree(), psutil.Process.resume)
        try:
            until_ready(self.url, self.process)
            yield
        finally:
            self.stop()

    def stop(self) -> None:
        """Have all its processes stand still, also those that one of them starts meanwhile."""
        still: set[psutil.Process] = set()
        while moving := set(self._tree()) - still:
            _each(moving, psutil.Process.suspend)
            still |= moving

    def end(self) -> None:
        """Have it drain and end, with all that it started."""
        tree = self._tree()
        _each(tree, psutil.Process.resume)
        _each(tree[:1], psutil.Process.terminate)
        if not _ended(tree):
            _each(tree, psutil.Process.kill)
            _ended(tree)
        self.process.poll()

    def memory(self) -> float:
        """GiB that its processes hold, shared pages counted once."""
        total = 0
        for one in self._tree():
            with suppress(psutil.Error):  # one may have ended meanwhile
                found = one.memory_full_info()
                total += getattr(found, "pss", found.rss)
        return round(total / 2**30, 2)

    def _tree(self) -> list[psutil.Process]:
        """Its processes, the first one first; none where that has ended."""
        try:
            return [self.process, *self.process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


def _each(tree: Iterable[psutil.Process], do: Callable[[psutil.Process], None]) -> None:
    for one in tree:
        with suppress(psutil.NoSuchProcess):  # one may have ended meanwhile
            do(one)


def _ended(tree: Sequence[psutil.Process]) -> bool:
    """Wait for their ends, and whether these came."""
    end = time.monotonic() + GRACE
    while (left := any(map(_runs, tree))) and time.monotonic() < end:
        time.sleep(0.05)
    return not left


def _runs(process: psutil.Process) -> bool:
    """Whether it has not ended; one that nobody has waited for has."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def serving(options: Sequence[str]) -> Iterator[Child]:
    """`vivace serve` with these options, ready; it ends with the block. Raises InputError."""
    port = free_port()
    # With all the threads it likes, and out of reach of the terminal's Ctrl-C: it is ended in order.
    mine = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "vivace", "serve", "--port", str(port), *options]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    child = Child(url=f"http://127.0.0.1:{port}", process=psutil.Popen(command, env=mine, **quiet))
    try:
        until_ready(child.url, child.process)
        yield child
    finally:
        child.end()


def free_port() -> int:
    """A port of this machine that nobody listens at now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def until_ready(url: str, process: psutil.Popen | None = None) -> None:
    """Wait until a server is ready. Raises InputError where its process has ended."""
    while not _ready(url):
        if process is not None and process.poll() is not None:
            raise InputError(
                f"the server ended with {process.returncode}; its command says why: {shlex.join(process.args)}"
            )
        time.sleep(0.05)


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=10) as answer:
            return answer.status == 200
    except OSError:
        return False
