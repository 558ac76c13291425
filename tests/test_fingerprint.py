"""A fingerprint follows the contents, and nothing else."""

import os

import pytest

from vivace import fingerprint as module
from vivace.fingerprint import PIECE, PIECES, fingerprint


def test_it_is_of_the_bytes_not_of_the_place_or_time(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name / "unet").mkdir(parents=True)
        (tmp_path / name / "unet" / "config.json").write_text("{}")
    os.utime(tmp_path / "other" / "unet" / "config.json", (0, 0))
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "other")
    (tmp_path / "other" / "unet" / "config.json").write_text("[]")
    assert fingerprint(tmp_path / "one") != fingerprint(tmp_path / "other")
    (tmp_path / "other" / "unet" / "config.json").write_text("{}")
    (tmp_path / "other" / "unet" / "config.json").rename(tmp_path / "other" / "config.json")
    assert fingerprint(tmp_path / "one") != fingerprint(tmp_path / "other")


@pytest.mark.parametrize("at", [0, PIECE * PIECES * 2 - 1])
def test_of_a_large_file_both_ends_count(tmp_path, monkeypatch, at):
    monkeypatch.setattr(module, "WHOLE", 1000)
    whole = bytearray(PIECE * PIECES * 2)
    (tmp_path / "a").write_bytes(whole)
    whole[at] = 1
    (tmp_path / "b").write_bytes(whole)
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")
