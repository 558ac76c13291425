"""A server that stands still costs nothing, and goes on where it was."""

import subprocess
import sys
import time

import psutil
import pytest

from vivace.bench.child import Child, free_port, serving, until_ready
from vivace.errors import InputError

SERVER = """
import os, subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Ready(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args):
        pass

BUSY = "import os, sys; held = bytearray(b'x' * 2**28)\\nwhile os.getppid() == int(sys.argv[1]): pass"
subprocess.Popen([sys.executable, "-c", BUSY, str(os.getpid())])
HTTPServer(("127.0.0.1", int(sys.argv[1])), Ready).serve_forever()
"""


@pytest.fixture
def child():
    """A server whose own child is never idle, holds a quarter of a GiB, and ends with it."""
    port = free_port()
    process = psutil.Popen([sys.executable, "-c", SERVER, str(port)])
    found = Child(url=f"http://127.0.0.1:{port}", process=process)
    until_ready(found.url, process)
    yield found
    found.end()


def spent(child):
    return sum(sum(one.cpu_times()[:2]) for one in (child.process, *child.process.children()))


def eventually(what):
    end = time.monotonic() + 60
    while not what() and time.monotonic() < end:
        time.sleep(0.05)
    return what()


def test_who_stands_still_costs_nothing_and_is_there_again_when_asked(child):
    child.stop()
    assert eventually(lambda: all(one.status() == psutil.STATUS_STOPPED for one in child._tree()))
    before = spent(child)
    time.sleep(0.3)
    assert spent(child) == before
    with child.awake():  # which waits for its answer
        assert eventually(lambda: spent(child) > before)
    assert eventually(lambda: all(one.status() == psutil.STATUS_STOPPED for one in child._tree()))


def test_its_memory_is_of_all_that_it_started_and_all_of_it_ends(child):
    assert eventually(lambda: child.memory() > 0.2)
    assert child.memory() < 0.6
    child.stop()
    tree = child._tree()
    assert len(tree) == 2
    child.end()
    assert all(not one.is_running() or one.status() == psutil.STATUS_ZOMBIE for one in tree)


def test_a_server_that_does_not_come_up_is_named():
    with pytest.raises(InputError, match=r"vivace serve .*model=nowhere"), serving(["model=nowhere/at/all"]):
        pytest.fail("it is up")


def test_a_server_that_ended_is_not_waited_for():
    process = psutil.Popen([sys.executable, "-c", "raise SystemExit(3)"], stderr=subprocess.DEVNULL)
    with pytest.raises(InputError, match="ended with 3"):
        until_ready(f"http://127.0.0.1:{free_port()}", process)
