"""A pipeline with the cache on, and what the report says of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import vivace


@pytest.fixture
def last() -> Callable[[Any], dict[str, Any]]:
    """What the cache of a pipeline's only denoiser did at the last request."""

    def read(pipe: Any) -> dict[str, Any]:
        (found,) = vivace.report(pipe).cache.values()
        return found["last_request"]

    return read
