"""The error a user can cause: what was wrong, what was given, what is allowed, what to do."""

import textwrap

LONGEST = 240  # characters of a library's own words


class InputError(ValueError):
    """Something the caller asked for that cannot be done; raised before anything is changed or written.

    The message is one line that says what, got, allowed, do this. On the command line it is all that is printed, with
    exit code 2; in Python it is an ordinary ValueError.
    """


def first_line(error: BaseException) -> str:
    """What an error of a library says, short enough for one line."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return textwrap.shorten(line, LONGEST, placeholder=" ...")


def install(extra: str) -> str:
    """The command that adds one of this project's extras, whose place is a clone of it."""
    return f"pip install -c constraints.txt -e '.[{extra}]'"
