"""The C library's heap, which does not shrink by itself."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def give_back() -> None:
    """Let the system have what was freed. Does nothing where the C library has no word for it.

    glibc keeps a heap for each of several threads, and gives back its end alone: after a week of pictures of many sizes
    what is free between two small things is far more than what is in use.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        found = ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):
        return None
    found.argtypes, found.restype = [ctypes.c_size_t], ctypes.c_int
    return found
