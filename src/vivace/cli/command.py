"""The command line as a reader would give it again: what a file of figures says of where they come from."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence


def command(*, without: Sequence[str] = ("-o", "--output")) -> str:
    """This process's command; the options of `without`, which name places of one's own, are left out with what follows.

    Only long options take their value after "=".
    """
    kept, skip = [], False
    for argument in sys.argv[1:]:
        if not skip and argument.partition("=")[0] not in without:
            kept.append(argument)
        skip = not skip and argument in without
    return shlex.join(["vivace", *kept])
