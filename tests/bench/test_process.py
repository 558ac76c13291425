"""A child process and all that it started end at the limit."""

import os
import time
from pathlib import Path

import pytest

from vivace.bench.process import run_module

CHILD = """
import subprocess, sys, time
from pathlib import Path
if sys.argv[1] == "hang":
    inner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    Path(sys.argv[2]).write_text(str(inner.pid))
    time.sleep(60)
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
    ended = run_module(module, [str(code)], seconds=60)
    assert (ended.code, ended.said) == (code, "last words\n")


def test_its_children_end_with_it(module, tmp_path):
    note = tmp_path / "pid"
    began = time.monotonic()
    ended = run_module(module, ["hang", str(note)], seconds=4)
    assert ended.code is None
    assert time.monotonic() - began < 30
    status = Path(f"/proc/{note.read_text()}/stat")
    for _ in range(100):
        # A killed process that nobody waits for yet is a zombie.
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the child's own child still runs")
