import shlex

import pytest

from vivace.cli.command import command


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("eval", "builtin", "--steps", "10"), "vivace eval builtin --steps 10"),
        (("eval", "-o", "mine", "--json=mine", "--seed", "3"), "vivace eval --seed 3"),
        (("eval", "--json", "--output", "--seed", "3"), "vivace eval --seed 3"),
        (("plan", "a b"), "vivace plan 'a b'"),
    ],
)
def test_the_command_as_a_reader_would_give_it(monkeypatch, given, told):
    monkeypatch.setattr("sys.argv", ["vivace", *given])
    assert command(without=("-o", "--output", "--json")) == told


def test_what_is_told_can_be_given_again(monkeypatch):
    given = ["eval", "--presets", "exact,fast", "--prompts", "a file's name.txt"]
    monkeypatch.setattr("sys.argv", ["vivace", *given])
    assert shlex.split(command())[1:] == given
