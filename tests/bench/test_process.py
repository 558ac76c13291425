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


def test_its_children_end_with_it(module, tmp_path):
    note = tmp_path / "pid"
    began = time.monotonic()
    ended = Children(module).run(["hang", str(note)], seconds=30)
    assert ended.code is None
    assert time.monotonic() - began < 60
    status = Path(f"/proc/{note.read_text()}/stat")
    for _ in range(100):
        # A killed process that nobody waits for yet is a zombie.
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the child's own child still runs")


def idle(process):
    """Wait until it has nothing left to do."""
    spent = -1.0
    while spent != (spent := sum(process.cpu_times()[:2])) or spent < 1:
        time.sleep(1)


def test_the_next_one_is_ready_and_ends_unused(module, tmp_path):
    with Children(module, ahead=True) as children:
        first = children.run(["0"], seconds=60)
        waiting = children._next
        assert waiting._process.poll() is None
        idle(psutil.Process(waiting._process.pid))
        began = time.monotonic()
        second = children.run(["3"], seconds=60)
        took = time.monotonic() - began
        unused = children._next._process
    assert (first.code, second.code) == (0, 3)
    assert took < 3
    assert unused.poll() is not None
