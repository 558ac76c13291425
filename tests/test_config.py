"""Config takes what exists, and names the nearest of what does not."""

import dataclasses
import math

import pytest

from vivace import PRESETS, Config, InputError
from vivace.config import parse_fields, preset_name, resolve


def test_presets_and_fields():
    assert resolve("exact") == Config() == PRESETS["exact"]
    assert (
        resolve("exact", fuse="off") == Config(fuse="off") == resolve(Config(), fuse="off") == resolve({"fuse": "off"})
    )
    assert preset_name(Config()) == "exact"
    assert preset_name(Config(fuse="off")) == "custom"
    assert len(dataclasses.fields(Config)) <= 24


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: resolve("exakt"), "unknown preset 'exakt'; the nearest is 'exact'"),
        (lambda: resolve("exact", atention="native"), "unknown Config field 'atention'; the nearest is 'attention'"),
        (lambda: Config(attention="flsh"), "the nearest is 'flash'"),
        (lambda: Config(fuse=True), "fuse is one of auto, on, off, got True"),
        (lambda: Config(check_nan="yes"), "check_nan is True or False, got 'yes'"),
        (lambda: Config(graph_gib=0), "graph_gib is a finite number above 0, got 0"),
        (lambda: Config(prompts_mib=math.inf), "prompts_mib is a finite number above 0, got inf"),
        (lambda: resolve(3), r"a preset is a name \(exact, balanced, fast\), a Config or a mapping .* got 3"),
        (lambda: parse_fields(["fuse"]), "FIELD=VALUE, got 'fuse'"),
        (lambda: parse_fields(["fuze=on"]), "the nearest is 'fuse'"),
        (lambda: parse_fields(["graph_gib=much"]), "graph_gib is a number, got 'much'"),
        (lambda: parse_fields(["check_nan=maybe"]), "check_nan is on or off"),
    ],
)
def test_errors_say_what_is_allowed(ask, message):
    with pytest.raises(InputError, match=message):
        ask()


def test_fields_from_the_command_line():
    fields = parse_fields(["attention=native", "check_nan=on", "graph_gib=1.5"])
    assert fields == {"attention": "native", "check_nan": True, "graph_gib": 1.5}
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config(**fields).fuse = "on"
