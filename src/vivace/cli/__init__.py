"""`vivace <verb>`: one file per verb; torch and everything heavy is imported inside the verb's function.

To add a verb: write `cli/<verb>.py` with a function of that name, and put the name where `--help` shall list it. A
mistake of the user's is raised as InputError; it comes out as one line on stderr with exit code 2.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from vivace.errors import InputError

ORDER = """
    generate ui serve info
    quantize merge distill
    eval calibrate tune
    families plan bench errors doctor
"""
VERBS = tuple(getattr(import_module(f"vivace.cli.{verb}"), verb) for verb in ORDER.split())

FULL = "the disk is full; free some of it, then give the same command again: what was finished is kept"
OUTSIDE = {
    errno.ENAMETOOLONG: "{}... is too long for a file's name; give a shorter one",
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
}
"""What the machine may refuse in the middle of any verb."""

app = typer.Typer(name="vivace", no_args_is_help=False, add_completion=False, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def vivace(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    """Diffusion pipelines, fast."""
    if version:
        from vivace import __version__

        print(__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())


for verb in VERBS:
    app.command()(verb)


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line; ends the process with 0, with 2 after a mistake of the user's, with 130 after Ctrl-C."""
    try:
        # Not standalone: typer would print its own mistakes as a box of several lines.
        code = app(args, prog_name="vivace", standalone_mode=False)
    except InputError as error:
        code = _complain(str(error))
    except typer.TyperException as error:
        code = _complain(_usage(error))
    except OSError as error:
        if error.errno not in OUTSIDE:
            raise
        code = _complain(OUTSIDE[error.errno].format(Path(str(error.filename)).name[:40]))
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    sys.exit(code if isinstance(code, int) else 0)


def _usage(error: typer.TyperException) -> str:
    """What is wrong with the arguments, the verb they were for, and where the allowed ones are listed."""
    format_message = getattr(error, "format_message", error.__str__)
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "vivace"
    return f"{format_message().rstrip('.')}; see {command} --help"


def _complain(message: str) -> int:
    print(f"vivace: {' '.join(message.split())}", file=sys.stderr)
    return 2
