"""A child process and all that it started end at the limit."""

import os
import time
from pathlib import Path

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


def gone(pid):
    """Whether a process has ended; a killed one that nobody waits for yet is a zombie."""
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


def test_they_import_together_and_what_outlasts_its_time_ends_with_its_children(module, tmp_path):
    note = tmp_path / "pid"
    with Children(module, together=3) as children:
        assert children.run(["0"], seconds=60).code == 0
        # Ready, since whoever runs must not have a neighbour that works.
        assert [child._ready.exists() for child in children.waiting] == [True, True]
        began = time.monotonic()
        # It has imported already: else these seconds would not do for it to start its own child.
        ended = children.run(["hang", str(note)], seconds=4)
        took = time.monotonic() - began
        unused = children.waiting[0]._process
        assert unused.poll() is None
    assert ended.code is None
    assert took < 30
    assert unused.poll() is not None
    until = time.monotonic() + 10
    while not gone(note.read_text()) and time.monotonic() < until:
        time.sleep(0.1)
    assert gone(note.read_text())


def test_one_that_cannot_begin_says_why_and_the_next_ones_begin(tmp_path, monkeypatch):
    (tmp_path / "diffusers.py").write_text("raise SystemExit('no such thing')")
    with monkeypatch.context() as broken:
        broken.setenv("PYTHONPATH", str(tmp_path))
        children = Children("json.tool", together=2)
        assert [children.run([], seconds=60).said for _ in range(2)] == ["no such thing\n"] * 2
    assert Children("json.tool").run(["--help"], seconds=60).code == 0
