"""A child process and all that it started end at the limit."""

import os
import time
from pathlib import Path

import psutil
import pytest

from vivace.bench.process import Children

CHILD = """
import subprocess, sys, time
from pathlib import Path
if sys.argv[1] == "hang":
    inner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    Path(sys.argv[2]).write_text(str(inner.pid))
    time.sleep(300)
print("last words")
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "a_child.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    return "a_child"


@pytest.mark.parametrize("code", [0, 3])
def test_the_exit_code_and_the_last_words(module, code):
    ended = Children(module).run([str(code)], seconds=60)
    assert (ended.code, ended.said) == (code, "last words\n")


def idle(process):
    """Wait until it has nothing left to do."""
    spent = -1.0
    while spent != (spent := sum(process.cpu_times()[:2])) or spent < 1:
        time.sleep(1)


def gone(pid):
    """Whether a process has ended; a killed one that nobody waits for yet is a zombie."""
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


def test_the_next_one_is_ready_and_what_outlasts_its_time_ends_with_its_children(module, tmp_path):
    note = tmp_path / "pid"
    with Children(module, ahead=True) as children:
        assert children.run(["0"], seconds=60).code == 0
        waiting = children._next._process
        assert waiting.poll() is None
        idle(psutil.Process(waiting.pid))
        began = time.monotonic()
        # It has imported already: else these seconds would not do for it to start its own child.
        ended = children.run(["hang", str(note)], seconds=4)
        took = time.monotonic() - began
        unused = children._next._process
    assert ended.code is None
    assert took < 30
    assert unused.poll() is not None
    until = time.monotonic() + 10
    while not gone(note.read_text()) and time.monotonic() < until:
        time.sleep(0.1)
    assert gone(note.read_text())
