"""`vivace families` lists every family, without loading torch."""

import json
import subprocess
import sys

import pytest

from vivace import cli
from vivace.families import FAMILIES


def families(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(["families", *arguments])
    return end.value.code


def test_the_table_names_every_family_variant_and_pipeline(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert families() == 0
    printed = capsys.readouterr().out
    for family in FAMILIES.values():
        for word in (family.name, family.title, *family.variants, *family.pipelines):
            assert word in printed


def test_a_narrow_terminal_loses_no_class_name(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert families() == 0
    printed = capsys.readouterr().out
    assert all(name in printed for family in FAMILIES.values() for name in family.pipelines)


def test_json_carries_the_facts(capsys):
    assert families("--json") == 0
    listed = {family["name"]: family for family in json.loads(capsys.readouterr().out)}
    assert list(listed) == list(FAMILIES)
    assert listed["sdxl"]["variants"]["base"]["parameters"] == 2_567_463_684
    assert listed["svd"]["media"] == "video"
    assert listed["pixart"]["pipelines"] == list(FAMILIES["pixart"].pipelines)


def test_it_loads_no_torch():
    program = "import sys, vivace.cli as c\ntry: c.main(['families'])\nfinally: assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 0
