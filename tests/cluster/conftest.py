"""A cluster of this process's own, for tests of work that is spread."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from vivace.cluster.connect import connect

# Looked for, not imported: Ray has to be told first what it is for.
collect_ignore_glob = [] if importlib.util.find_spec("ray") else ["test_*.py"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with connect(cpus=2, store_bytes=100 * 2**20):
        yield
