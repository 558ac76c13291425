"""The built-in model's recipe lies outside the package: its modules import each other by their bare names."""

import sys
from importlib import import_module
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "builtin"


@pytest.fixture(scope="session")
def recipe():
    """A module of the recipe by its name."""

    def load(name):
        sys.path.insert(0, str(RECIPE))
        try:
            return import_module(name)
        finally:
            sys.path.remove(str(RECIPE))

    return load
