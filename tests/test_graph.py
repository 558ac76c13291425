"""The graph layer's bookkeeping with a recorder that runs on the CPU, and the real one on a GPU."""

import pytest
import torch
from torch.utils._pytree import tree_unflatten

from vivace.graph import Graphs, Recording


class Recorder:
    """Records as CUDA graphs do: fixed inputs, and outputs that the next replay overwrites."""

    def __init__(self, nbytes=10):
        self.recorded, self.nbytes = [], nbytes

    def __call__(self, segment, leaves, spec):
        static = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        inputs = [leaf for leaf in static if isinstance(leaf, torch.Tensor)]
        output = segment(**tree_unflatten(static, spec))
        self.recorded.append(tuple(tensor.shape for tensor in inputs))
        replay = lambda: output.copy_(segment(**tree_unflatten(static, spec)))  # noqa: E731
        return Recording(inputs=inputs, output=output, replay=replay, nbytes=self.nbytes)


@pytest.fixture
def as_on_a_device(monkeypatch):
    """Take CPU tensors for device ones; a CPU tensor's value would be frozen into a real recording."""
    monkeypatch.setattr("vivace.graph.HOST", "elsewhere")


def segment(x, factor):
    return x * factor


def run(graphs, size, factor=2.0):
    with torch.no_grad():
        x = torch.rand(size)
        out = graphs("forward", segment, x=x, factor=factor)
        assert torch.equal(out, x * factor)
        return out


def test_records_at_the_second_call_and_replays_after(as_on_a_device):
    graphs = Graphs(budget=100, record=(record := Recorder()))
    outs = [run(graphs, 3) for _ in range(4)]
    assert record.recorded == [(torch.Size([3]),)]
    assert len({out.data_ptr() for out in outs}) == 4


def test_a_signature_is_shapes_and_values(as_on_a_device):
    graphs = Graphs(budget=100, record=Recorder())
    for size, factor in ((3, 2.0), (4, 2.0), (3, 3.0), (3, 2)):
        for _ in range(2):
            run(graphs, size, factor)
    assert len(graphs.recordings) == 4


def test_nothing_is_recorded_or_replayed_under_autocast(as_on_a_device):
    graphs = Graphs(budget=100, record=(record := Recorder()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(3):
            run(graphs, 3)
    assert record.recorded == []


def test_the_least_recently_used_goes_first(as_on_a_device):
    graphs = Graphs(budget=25, record=(record := Recorder()))
    for size in (1, 1, 2, 2, 1, 3, 3):
        run(graphs, size)
    assert graphs.nbytes <= 25
    run(graphs, 1)
    assert [shapes[0][0] for shapes in record.recorded] == [1, 2, 3]
    run(graphs, 2)
    assert [shapes[0][0] for shapes in record.recorded] == [1, 2, 3, 2]
    graphs.clear()
    assert graphs.nbytes == 0


def test_cpu_tensors_and_gradients_run_as_they_are():
    graphs = Graphs(budget=100, record=(record := Recorder()))
    for _ in range(3):
        run(graphs, 3)
        graphs("forward", segment, x=torch.rand(2), factor=torch.rand(2, requires_grad=True))
    assert record.recorded == []


@pytest.mark.gpu
def test_on_a_gpu():
    graphs = Graphs(budget=2**30)
    with torch.no_grad():
        for size in (64, 64, 64, 32, 32, 64):
            x = torch.rand(size, size, device="cuda")
            torch.testing.assert_close(graphs("forward", torch.matmul, input=x, other=x), x @ x)
    assert len(graphs.recordings) == 2
