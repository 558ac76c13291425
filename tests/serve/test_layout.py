"""Layouts: where the rows are is seen, and where they are not quite where they seem, that is seen too."""

from typing import NamedTuple

import pytest
import torch

from vivace.serve.layout import Kind, Layout, Layouts, NoLayout, Rows, describe, join, split


def state(rows, **context):
    x = torch.arange(6.0).reshape(1, 3, 2).repeat(rows, 1, 1)
    return {"x": x, "text": None, "context": {"rope": torch.arange(4.0), "temb": x[:, 0], **context}, "ahead": None}


def test_rows_and_what_is_the_same_for_all_are_told_apart():
    once = state(2, frames=torch.ones(6, 5), shape=(2, 3), sizes=[(8, 8)] * 2, mask=None, name="a")
    twice = state(4, frames=torch.ones(12, 5), shape=(4, 3), sizes=[(8, 8)] * 4, mask=None, name="a")
    layout = Layout.of(once, twice, rows=2)
    assert layout.x == Rows(1)
    assert layout.context == {
        "rope": Kind.ALIKE,
        "temb": Rows(1),
        "frames": Rows(3),
        "shape": (Kind.COUNTED, Kind.ALIKE),
        "sizes": Kind.LISTED,
        "mask": Kind.ALIKE,
        "name": Kind.ALIKE,
    }


@pytest.mark.parametrize(
    ("once", "twice"),
    [
        # two kinds of rows, one kind after the other: the halves of the double are not what the single was
        (torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0], [1.0], [0.0], [0.0]])),
        (torch.ones(3, 2), torch.ones(3, 4)),
        (torch.ones(2), torch.zeros(2)),
        (torch.tensor(1.0), torch.tensor(2.0)),
        (torch.full((1, 2), float("nan")), torch.full((2, 2), float("nan"))),
        (1.5, 3.0),
        ([1, 2], [1, 2, 3]),
        (object(), object()),
    ],
)
def test_what_cannot_be_told_is_refused(once, twice):
    with pytest.raises(NoLayout):
        Layout.of(state(1, odd=once), state(2, odd=twice), rows=1)


def test_a_mask_of_infinities_has_rows_like_anything_else():
    mask = torch.tensor([[0.0, -torch.inf]])
    layout = Layout.of(state(1, mask=mask), state(2, mask=mask.repeat(2, 1)), rows=1)
    assert layout.context["mask"] == Rows(1)


def test_joined_states_come_apart_again():
    layout = Layout.of(state(1, shape=(1, 3), sizes=["a"]), state(2, shape=(2, 3), sizes=["a", "a"]), rows=1)
    one, two = state(1, shape=(1, 3), sizes=["a"]), state(2, shape=(2, 3), sizes=["b", "c"])
    one["skips"], two["skips"] = (one["x"] + 1, one["x"] + 2), (two["x"] + 3, two["x"] + 4)
    plan = layout.plan(one)
    assert describe(plan, one) == describe(plan, two)
    joined = join(plan, [one, two])
    assert joined["x"].shape == (3, 3, 2)
    assert joined["context"]["shape"] == (3, 3)
    assert joined["context"]["sizes"] == ["a", "b", "c"]
    assert "ahead" not in joined
    parts = split(plan, joined, rows=[1, 2])
    for part, whole in zip(parts, (one, two), strict=True):
        assert part["context"]["sizes"] == whole["context"]["sizes"]
        assert part["context"]["shape"] == whole["context"]["shape"]
        for mine, theirs in zip((part["x"], *part["skips"]), (whole["x"], *whole["skips"]), strict=True):
            assert torch.equal(mine, theirs)
            assert mine.untyped_storage().nbytes() == mine.nbytes, "it would keep its neighbours' memory"


@pytest.mark.parametrize("change", [{"rope": torch.arange(5.0)}, {"name": "b"}, {"temb": torch.ones(1, 3)}])
def test_states_that_differ_beyond_their_rows_are_not_alike(change):
    layout = Layout.of(state(1, name="a"), state(2, name="a"), rows=1)
    one, other = state(1, name="a"), state(1, **{"name": "a", **change})
    assert describe(layout.plan(one), one) != describe(layout.plan(other), other)


def test_named_tuples_stay_what_they_are():
    class Rotary(NamedTuple):
        cos: torch.Tensor
        rows: torch.Tensor

    def with_rotary(rows):
        return state(rows, rope=Rotary(torch.ones(4), torch.ones(rows, 2)))

    layout = Layout.of(with_rotary(1), with_rotary(2), rows=1)
    joined = join(layout.context, [with_rotary(1)["context"]] * 3)
    assert isinstance(joined["rope"], Rotary)
    assert joined["rope"].rows.shape == (3, 2)
    assert [part["rope"].rows.shape for part in split(layout.context, joined, rows=[1, 2])] == [(1, 2), (2, 2)]


def test_layouts_are_bounded_and_know_what_has_none(monkeypatch):
    monkeypatch.setattr("vivace.serve.layout.KEPT", 2)
    layouts = Layouts()
    for number in range(3):
        layouts.keep(number, None)
    assert [number in layouts for number in range(3)] == [False, True, True]
    assert layouts.get(2) is None
    layouts.clear()
    assert 2 not in layouts
