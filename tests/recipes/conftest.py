"""The built-in model's recipe lies outside the package: its modules import each other by their bare names."""

import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
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


@pytest.fixture(scope="session")
def distill_recipe():
    """A module of recipes/distill by its name, which may be that of one of the built-in model's recipe."""

    def load(name):
        spec = spec_from_file_location(f"recipes_distill_{name}", RECIPE.parent / "distill" / f"{name}.py")
        module = module_from_spec(spec)
        # A dataclass looks its module up while it is made.
        sys.modules[spec.name] = module
        sys.path.insert(0, str(RECIPE.parent / "distill"))
        try:
            spec.loader.exec_module(module)
        finally:
            sys.path.remove(str(RECIPE.parent / "distill"))
        return module

    return load
