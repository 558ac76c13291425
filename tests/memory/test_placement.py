"""Plans: the quickest that fits, what it needs at its peak, and what to ask for where nothing fits."""

from dataclasses import replace

import pytest

from vivace import InputError
from vivace.memory.placement import CONTEXT, GIB, LEVELS, SPARE, Part, budget_of, place, spread


def flux(*, experts=1):
    """Bytes of a FLUX.1 in 16 bit."""
    denoisers = [
        Part(name=name, kind="denoiser", held=GIB, blocks=(GIB // 2,) * 42, work=GIB)
        for name in ("transformer", "transformer_2")[:experts]
    ]
    return [
        *denoisers,
        Part(name="text_encoder", kind="encoder", held=GIB // 8, work=GIB // 8),
        Part(name="text_encoder_2", kind="encoder", held=GIB // 4, blocks=(3 * GIB // 8,) * 24, work=GIB // 4),
        Part(name="vae", kind="vae", held=GIB // 8, work=4 * GIB, strip_work=GIB // 2),
    ]


@pytest.mark.parametrize(
    ("budget", "level"),
    [(80, "resident"), (33, "strips"), (25, "encoders"), (23, "streamed"), (12, "streamed")],
)
def test_the_quickest_that_fits(budget, level):
    plan = place(flux(), budget=budget * GIB)
    assert plan.level == level
    assert plan.peak <= budget * GIB
    assert LEVELS.index(level) >= LEVELS.index(place(flux(), budget=(budget + 4) * GIB).level)


def test_as_few_blocks_are_streamed_as_will_do():
    plans = [place(flux(), budget=budget * GIB) for budget in (20, 16, 12)]
    counts = [len(plan.place_of("transformer").streamed) for plan in plans]
    assert counts == sorted(counts)
    assert 0 < counts[0] < counts[2] < 42
    for plan in plans:
        assert plan.peak > plan.budget - GIB
        assert plan.moved_per_call == len(plan.place_of("transformer").streamed) * GIB // 2


def test_peak_by_hand():
    plan = place(flux(), budget=80 * GIB)
    assert plan.peak == sum(part.nbytes for part in flux()) + 4 * GIB + SPARE
    assert plan.host == plan.moved_per_image == plan.moved_per_call == 0
    small = place(flux(), budget=None, level="streamed")
    # One GiB of rest, two slots, the VAE; beside them the second encoder's rest, two slots and work.
    assert small.peak == (GIB + GIB + GIB // 8) + (GIB // 4 + 3 * GIB // 4 + GIB // 4) + SPARE
    assert small.moved_per_call == 21 * GIB


def test_graphs_hold_what_their_denoisers_work_in():
    parts = [replace(part, recorded=part.work if part.kind == "denoiser" else 0) for part in flux(experts=2)]
    plans = {level: place(parts, budget=None, level=level) for level in LEVELS}
    without = {level: place(flux(experts=2), budget=None, level=level) for level in LEVELS}
    # Two graphs of a GiB stay while the VAE decodes; while one denoiser computes anew, the other's does.
    assert plans["resident"].peak == without["resident"].peak + 2 * GIB
    assert "CUDA graphs hold 2.00 GiB" in str(plans["resident"])
    # What takes turns is not recorded.
    assert plans["parked"].peak == without["parked"].peak
    assert plans["streamed"].peak == without["streamed"].peak
    # Streamed blocks come to the same places, so that one denoiser's graph stays while the VAE decodes.
    one, other = (place(given[1:], budget=None, level="streamed") for given in (parts, flux(experts=2)))
    assert one.streams
    assert one.peak == other.peak + GIB


def test_experts_take_turns_before_anything_is_streamed():
    plan = place(flux(experts=2), budget=30 * GIB)
    assert plan.level == "parked"
    assert plan.moved_per_call == 0
    assert plan.moved_per_image >= 2 * 22 * GIB
    assert plan.host >= 2 * 22 * GIB
    assert place(flux(experts=2), budget=80 * GIB).level == "resident"
    streamed = place(flux(experts=2), budget=16 * GIB)
    assert streamed.parked
    assert streamed.peak <= 16 * GIB


def test_too_small_says_what_would_do():
    with pytest.raises(InputError, match="at least vram='") as error:
        place(flux(), budget=2 * GIB)
    least = str(error.value).split("vram='")[1].rstrip("'")
    assert place(flux(), budget=budget_of(least)).level == "streamed"
    less = f"{float(least.removesuffix('GB')) - 0.2:g}GB"
    with pytest.raises(InputError):
        place(flux(), budget=budget_of(less))


@pytest.mark.parametrize(("text", "gib"), [("24GB", 23), ("6 GiB", 5), ("8g", 7), ("1.5GB", 0.5)])
def test_sizes(text, gib):
    assert budget_of(text) == gib * GIB
    assert CONTEXT == GIB


def test_levels_and_auto():
    assert all(budget_of(level) is None for level in LEVELS)
    assert budget_of("auto", free=5) == 5
    for level in LEVELS:
        assert LEVELS.index(place(flux(experts=2), budget=None, level=level).level) <= LEVELS.index(level)


@pytest.mark.parametrize("text", ["24", "GB", "0GB", "-3GB", "lots", "24MB"])
def test_what_is_no_size(text):
    with pytest.raises(InputError, match="a size like 24GB"):
        budget_of(text)
    with pytest.raises(InputError, match="asks a GPU"):
        budget_of("auto")


def test_a_plan_in_words():
    text = str(place(flux(), budget=12 * GIB))
    for part in (
        "transformer 22.00 GiB",
        "blocks streamed from the host",
        "a denoiser call moves",
        "strip by strip",
        "peak",
    ):
        assert part in text


def test_streamed_blocks_lie_evenly():
    assert spread(0, of=5) == []
    assert spread(5, of=5) == [0, 1, 2, 3, 4]
    assert spread(2, of=6) == [1, 4]
    assert len(spread(19, of=57)) == 19
