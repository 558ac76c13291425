"""The command line as a whole: help, version, and how a mistake of the user's comes out."""

import subprocess
import sys

import pytest
import typer

import vivace
from vivace import cli


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "vivace", *arguments], capture_output=True, text=True, timeout=60)


def code_of(*arguments: str) -> object:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    return end.value.code


@pytest.fixture
def verb(monkeypatch):
    """Puts a verb `odd` in the place of all others, which does what the test gives it."""

    def put(function):
        app = typer.Typer()
        app.callback()(lambda: None)
        app.command("odd")(function)
        monkeypatch.setattr(cli, "app", app)

    return put


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_help_lists_every_verb(arguments, capsys):
    assert code_of(*arguments) == 0
    text = capsys.readouterr().out
    for function in cli.VERBS:
        assert function.__name__ in text


@pytest.mark.parametrize("function", cli.VERBS, ids=lambda function: function.__name__)
def test_every_verb_has_help(function, capsys):
    assert code_of(function.__name__, "--help") == 0
    assert f"vivace {function.__name__}" in capsys.readouterr().out


def test_version(capsys):
    assert code_of("--version") == 0
    assert capsys.readouterr().out == f"{vivace.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("docter",), "Did you mean 'doctor'"),
        (("doctor", "--jsn"), "No such option: --jsn"),
        (("doctor", "now"), "unexpected extra argument"),
        (("--nothing",), "No such option: --nothing"),
    ],
)
def test_usage_mistake_is_one_line(arguments, said):
    ended = run(*arguments)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("vivace: ")
    assert ended.stderr.count("\n") == 1
    assert said in ended.stderr
    assert ended.stderr.rstrip().endswith("--help")


def test_input_error_is_one_line(verb, capsys):
    def odd():
        raise vivace.InputError("steps: got 0,\n  allowed 1 and more; pass --steps 28")

    verb(odd)
    assert code_of("odd") == 2
    caught = capsys.readouterr()
    assert (caught.out, caught.err) == ("", "vivace: steps: got 0, allowed 1 and more; pass --steps 28\n")


def test_other_errors_keep_their_traceback(verb):
    def odd():
        raise RuntimeError("a mistake of ours")

    verb(odd)
    with pytest.raises(RuntimeError, match="of ours"):
        cli.main(["odd"])


def test_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "vivace", "families"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[0].startswith("vivace: the disk is full; free some of it")
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 130), (lambda: typer.Exit(3), 3)])
def test_exit_codes(verb, error, code):
    def odd():
        raise error()

    verb(odd)
    assert code_of("odd") == code
