"""Weights streamed block by block: the same results, and never more of them on the device than planned."""

import copy
from contextlib import ExitStack

import pytest
import torch

from vivace import InputError
from vivace.memory.stream import Stream, Trip, Turn

CPU = torch.device("cpu")
DEVICES = [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)]


class Tower(torch.nn.Module):
    """A linear in front of a few blocks, with a tied weight, a buffer and a channels-last convolution."""

    def __init__(self, depth=5):
        super().__init__()
        self.inward = torch.nn.Linear(8, 16)
        self.blocks = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh()) for _ in range(depth)
        )
        self.outward = torch.nn.Linear(8, 16)
        self.outward.weight = self.inward.weight
        self.register_buffer("scale", torch.tensor(2.0))
        convolution = torch.nn.Conv2d(3, 4, 3)
        self.convolution = convolution.to(memory_format=torch.channels_last)

    def forward(self, x):
        x = self.inward(x)
        for block in self.blocks:
            x = block(x)
        return self.outward(x[..., :8]) * self.scale


def placed(tower, device, *, streamed, **options):
    stream = Stream(tower, blocks=list(tower.blocks), streamed=streamed, device=device, **options)
    undo = ExitStack()
    stream.install(undo=undo)
    return stream, undo


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("stay", ["always", "call"])
@pytest.mark.parametrize("streamed", [(), (2,), (0, 2, 4), tuple(range(5))], ids=str)
def test_results_and_restoring(device, stay, streamed):
    tower = Tower()
    before, kind = copy.deepcopy(tower.state_dict()), type(tower)
    pointers = {name: tensor.stride() for name, tensor in tower.named_parameters()}
    x = torch.randn(3, 8, device=device)
    wanted = copy.deepcopy(tower).to(device)(x)
    stream, undo = placed(tower, device, streamed=streamed, stay=stay)
    assert stream.nbytes == 1280 * len(streamed)
    for _ in range(3):
        torch.testing.assert_close(tower(x), wanted)
    assert tower.device == device
    for index in streamed:
        assert tower.blocks[index][0].weight.device == CPU
    if stay == "call":
        assert tower.inward.weight.device == CPU
    undo.close()
    assert type(tower) is kind
    assert tower.inward.weight is tower.outward.weight
    for name, tensor in tower.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.device == CPU
    assert {name: tensor.stride() for name, tensor in tower.named_parameters()} == pointers


def test_blocks_out_of_order_and_skipped():
    tower = Tower()
    x = torch.randn(3, 16)
    wanted = [block(x) for block in tower.blocks]
    placed(tower, CPU, streamed=range(5))
    tower(torch.randn(1, 8))
    for index in (3, 3, 0, 4, 1, 2, 0):
        torch.testing.assert_close(tower.blocks[index](x), wanted[index])


def test_the_order_of_the_calls_is_learned(monkeypatch):
    class Odd(Tower):
        def forward(self, x):
            for index in (3, 1, 4):
                x = self.blocks[index](x)
            return x

    odd, x = Odd(), torch.randn(2, 16)
    wanted = odd(x)
    stream, _ = placed(odd, CPU, streamed=range(5))
    copies, copy_one = [], Trip._copy
    monkeypatch.setattr(Trip, "_copy", lambda trip, *given: copies.append(trip.now) or copy_one(trip, *given))
    for _ in range(2):
        copies.clear()
        torch.testing.assert_close(odd(x), wanted)
    # One copy each, and none of them only when its block is called.
    assert [*stream._orders.values()] == [(3, 1, 4)]
    assert len(copies) == 3


class Clock:
    """A device's stream as far as order goes: what it has done, and what it knows others to have done before."""

    device = None
    now = ()  # those that were entered, and the one that computes

    def __init__(self):
        self.known = set()

    def __enter__(self):
        Clock.now.append(self)

    def __exit__(self, *error):
        Clock.now.pop()

    def does(self, what):
        self.known |= {what}

    def record_event(self):
        return frozenset(self.known)

    def wait_event(self, event):
        self.known |= event

    def wait_stream(self, other):
        self.known |= other.known


def test_what_is_copied_waits_for_what_reads_and_the_other_way_round(monkeypatch):
    """On a device nothing else orders the copies and what computes; a recording has nothing but this order."""
    compute, copies = Clock(), Clock()
    monkeypatch.setattr(Clock, "now", [compute])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Clock.now[-1])
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    tower = Tower()
    stream, _ = placed(tower, CPU, streamed=(0, 1, 3, 4))
    stream._copies = copies
    reads, copied = {slot.data_ptr(): set() for slot in stream._slots}, {}
    copy_one, take, leave = Trip._copy, Trip.take, Trip.leave

    def copy_in_order(trip, group, slot):
        # Whatever was computed with this slot is over.
        assert reads[slot.data_ptr()] <= copies.known
        copied[slot.data_ptr()] = ("copy", len(copied), id(group), len(copies.known))
        copies.does(copied[slot.data_ptr()])
        return copy_one(trip, group, slot)

    def take_in_order(trip, index):
        take(trip, index)
        assert copied[trip._coming[0].slot.data_ptr()] in compute.known

    def leave_in_order(trip, index):
        read = ("read", index, len(compute.known))
        reads[trip._coming[0].slot.data_ptr()].add(read)
        compute.does(read)
        leave(trip, index)

    for name, one in (("_copy", copy_in_order), ("take", take_in_order), ("leave", leave_in_order)):
        monkeypatch.setattr(Trip, name, one)
    for blocks in (tower.blocks, reversed(tower.blocks), tower.blocks[2:], tower.blocks[:1], tower.blocks):
        begin = len(copies.known)
        with stream.bring(tower.blocks):
            for block in blocks:
                block(torch.randn(1, 16))
        assert len(copies.known) > begin
        # Both have come together again: nothing is under way.
        assert copies.known <= compute.known


def test_a_call_that_fails_leaves_the_weights_at_home():
    tower = Tower()
    stream, _ = placed(tower, CPU, streamed=(1, 2), stay="call")
    with pytest.raises(RuntimeError):
        tower(torch.randn(1, 9))
    assert stream._arrived is None
    assert tower(torch.randn(1, 8)).shape == (1, 16)


def test_one_of_two_experts_is_parked():
    first, second, turn = Tower(), Tower(), Turn()
    streams = [placed(tower, CPU, streamed=(1,), stay="turn", turn=turn)[0] for tower in (first, second)]
    x = torch.randn(2, 8)
    for tower, other in ((first, 1), (first, 1), (second, 0), (first, 1)):
        tower(x)
        assert streams[other]._arrived is None
        assert turn.holder is streams[1 - other]


def test_moving_and_casting_are_refused():
    tower = Tower()
    _, undo = placed(tower, CPU, streamed=(1,))
    assert tower.to(CPU) is tower
    with pytest.raises(InputError, match="placed by vram="):
        tower.to(torch.float64)
    undo.close()
    assert tower.to(torch.float64).inward.weight.dtype == torch.float64


class Run(torch.nn.Module):
    """Blocks that take as long to come as to compute."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(2048, 2048) for _ in range(16))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x

    def at_home(self, x):
        for block in self.blocks:
            x = torch.nn.functional.linear(x, block.weight, block.bias)
        return x


def streamed_run():
    run = Run().requires_grad_(False)
    stream = Stream(run, blocks=list(run.blocks), streamed=range(16), device=torch.device("cuda"))
    stream.install(undo=ExitStack())
    return run, stream


@pytest.mark.gpu
def test_the_device_holds_two_blocks_and_what_is_held():
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run, _ = streamed_run()
    x = torch.randn(4, 2048, device="cuda")
    torch.testing.assert_close(run(x).cpu(), run.at_home(x.cpu()), rtol=1e-3, atol=1e-3)
    block_bytes = 2048 * 2049 * 4
    assert torch.cuda.max_memory_allocated() - before < 2.5 * block_bytes


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [4, 4096])
def test_a_recorded_call_copies_weights_as_they_are_at_each_replay(rows):
    run, stream = streamed_run()
    x = torch.randn(rows, 2048, device="cuda")
    run(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = run(x)
    for _ in range(5):
        with stream.writing():
            run.blocks[3].weight.mul_(-1)
        x.normal_()
        graph.replay()
        # What comes after a replay takes the same slots.
        torch.testing.assert_close(run(x), out, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(out.cpu(), run.at_home(x.cpu()), rtol=1e-3, atol=1e-3)
