"""`vivace info`: what made a picture or video."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def info(
    path: Annotated[Path, typer.Argument(help="A PNG or mp4 that vivace wrote.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
) -> None:
    """Print the prompt, seed and settings that a picture carries."""
    from vivace.generation import picture, video

    made = video.facts(path) if path.suffix.lower() == ".mp4" else picture.facts(path)
    if as_json:
        print(json.dumps(made))
        return
    settings = made.pop("settings")
    width, height = made.pop("size")
    for name, value in {**made, "size": f"{width}x{height}", **settings}.items():
        print(f"{name:20} {value}")
