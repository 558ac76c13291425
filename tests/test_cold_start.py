"""The forecast of a cold start follows what is done to a model, and where."""

from types import SimpleNamespace

import pytest
import torch

import vivace
from vivace.cold_start import cold_start, told
from vivace.families import FAMILIES
from vivace.passes.target import Note


def target(family, *done, device="cuda"):
    pipe = FAMILIES[family].tiny()
    denoisers = {name: getattr(pipe, name) for name in FAMILIES[family].denoisers}
    notes = [Note(name=name, done=name in done, detail="") for name in ("quant", "fuse", "compile")]
    return SimpleNamespace(device=torch.device(device), denoisers=denoisers, notes=notes)


@pytest.mark.parametrize(
    ("family", "done", "said"),
    [
        ("flux", ["fuse"], "3.5 to 5.5 s"),
        ("flux", ["fuse", "quant"], "5.5 to 11.5 s"),
        ("sdxl", ["fuse"], "7 to 11 s"),
        ("sdxl", ["compile"], "12 to 17 s"),
        ("sdxl", ["quant"], "nothing to compile"),
    ],
)
def test_what_is_done_says_how_long(family, done, said):
    assert told(cold_start(target(family, *done))).startswith(said)


def test_a_processor_compiles_nothing_of_ours():
    assert told(cold_start(target("flux", "fuse", device="cpu"))) == "nothing to compile"
    assert told(cold_start(target("flux", "compile", device="cpu"))) == "not measured here"
    planned = vivace.plan("flux", device="cpu")
    assert planned.cold_start_seconds == (0.0, 0.0)
    assert "  cold start: nothing to compile\n" in str(planned)
