"""`vivace doctor`: what works on this machine, each thing tried."""

from __future__ import annotations

from typing import Annotated

import typer


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the tables.")] = False,
) -> None:
    """Try what works here: dtypes, attention, kernels, optional packages."""
    import json

    from vivace.doctor import examine

    diagnosis = examine()
    if as_json:
        print(json.dumps(diagnosis.to_dict()))
    else:
        from rich.console import Console

        Console().print(diagnosis)
