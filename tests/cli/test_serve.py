"""`vivace serve` as a process: it starts, draws, and ends as it should."""

import subprocess
import sys

import pytest

from vivace.cli import main


def code_of(*arguments: str) -> object:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return end.value.code


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--host", "0.0.0.0"), "--api-key"),
        (("--api-key", "short"), "16 characters"),
        (("sdxl",), "ALIAS=VALUE"),
        (("x=/no/such/model",), "no model at"),
        (("--lora", "style"), "ALIAS=VALUE"),
    ],
)
def test_mistakes_are_one_line(arguments, said, capsys):
    assert code_of("serve", *arguments) == 2
    text = capsys.readouterr().err
    assert said in text
    assert text.count("\n") == 1


def test_what_is_missing_is_named():
    code = "import sys; sys.modules['uvicorn'] = None\nfrom vivace.cli import main\nmain(['serve', 'x=/no/such/model'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "pip install 'vivace[serve]'" in done.stderr
