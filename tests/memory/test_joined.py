"""Tensors that are read as one: joined once, left where they lie side by side, followed where they are brought."""

from contextlib import ExitStack

import pytest
import torch

from vivace.memory.group import Group
from vivace.memory.joined import followed, join, planning


def parts():
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(rows, 4)) for rows in (3, 5)]


def test_joined_until_the_undo():
    pair = parts()
    wanted = torch.cat([one.data for one in pair])
    with ExitStack() as undo:
        whole = join(pair, undo)
        assert torch.equal(whole, wanted)
        pair[1].data[0] = 7
        assert whole[3].eq(7).all()
        assert join(pair, undo).data_ptr() == whole.data_ptr()
    assert pair[0].untyped_storage().data_ptr() != pair[1].untyped_storage().data_ptr()


@pytest.mark.parametrize("apart", ["a gap", "another order", "another width"])
def test_what_does_not_lie_side_by_side_is_copied(apart):
    flat = torch.randn(40)
    spans = {"a gap": ((0, 12), (16, 36)), "another order": ((20, 32), (0, 20)), "another width": ((0, 12), (12, 32))}
    pair = [torch.nn.Parameter(flat[start:end].view(-1, 4)) for start, end in spans[apart]]
    if apart == "another width":
        pair[1].data = pair[1].data.t()
        assert not pair[1].is_contiguous()
        pair[0].data = pair[0].data.view(-1, 1).expand(-1, 5)
    wanted = torch.cat([one.data for one in pair])
    whole = join(pair, ExitStack())
    assert torch.equal(whole, wanted)
    assert whole.untyped_storage().data_ptr() != flat.untyped_storage().data_ptr()


def test_a_group_keeps_them_side_by_side_and_they_are_followed():
    module, alone = torch.nn.Module(), torch.nn.Parameter(torch.randn(2, 3))
    pair = parts()
    wanted = torch.cat([one.data for one in pair])
    with planning() as planned:
        join(pair, ExitStack())
    assert [id(one) for one in planned[0]] == [id(one) for one in pair]
    group = Group([pair[1], alone, pair[0]], module=module, pin=False, joined=planned)
    whole = join(pair, ExitStack())
    assert whole.untyped_storage().data_ptr() == group.host.untyped_storage().data_ptr()
    there = group.host.clone()
    group.point(there)
    moved = followed(whole, pair[0])
    assert moved.untyped_storage().data_ptr() == there.untyped_storage().data_ptr()
    assert torch.equal(moved, wanted)
    group.point(group.host)
    assert followed(moved, pair[0]).data_ptr() == whole.data_ptr()
    assert followed(whole, pair[0]) is whole
