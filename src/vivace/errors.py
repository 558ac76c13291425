"""The error a user can cause: what was wrong, what was given, what is allowed, what to do."""


class InputError(ValueError):
    """Something the caller asked for that cannot be done; raised before anything is changed or written.

    The message is one line that says what, got, allowed, do this. On the command line it is all that is printed, with
    exit code 2; in Python it is an ordinary ValueError.
    """


def first_line(error: BaseException) -> str:
    """What an error of a library says, short enough for one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:240]
