"""A picture in the terminal, where the terminal can show one (textual-image, the `[ui]` extra)."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def show(path: Path) -> bool:
    """Print a PNG into the terminal; False where that cannot be done, and nothing was printed."""
    if path.suffix.lower() != ".png" or not sys.stdout.isatty():
        return False
    # A terminal may not know its size; then there is nothing to fit a picture into.
    if not os.get_terminal_size(sys.stdout.fileno()).columns:
        return False
    try:
        from textual_image.renderable import Image  # pyright: ignore[reportMissingImports]
    except ImportError:
        return False
    from rich.console import Console

    console = Console()
    console.print(Image(str(path), width="auto", height=min(24, console.height - 2)))
    return True
