"""What a file or a folder holds, in a few letters: a kept result is known to be of the same model and picture."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO

WHOLE = 16 * 2**20  # bytes; of larger files, which are weights, pieces are read
PIECES = 16
PIECE = 64 * 2**10  # bytes


def fingerprint(path: Path) -> str:
    """Of a file's bytes, or of a folder's files and their names; neither the place nor the time of writing matters.

    Of large files PIECES, evenly spaced, and the length: training changes weights everywhere.
    """
    digest = hashlib.sha256()
    files = sorted(found for found in path.rglob("*") if found.is_file()) if path.is_dir() else [path]
    for one in files:
        length = one.stat().st_size
        digest.update(f"{one.relative_to(path).as_posix()} {length}\n".encode())
        with one.open("rb") as file:
            for piece in _pieces(file, length):
                digest.update(piece)
    return digest.hexdigest()[:16]


def _pieces(file: BinaryIO, length: int) -> list[bytes]:
    if length <= WHOLE:
        return [file.read()]
    found = []
    for number in range(PIECES):
        file.seek((length - PIECE) * number // (PIECES - 1))
        found.append(file.read(PIECE))
    return found
