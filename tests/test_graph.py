"""The graph layer's bookkeeping with a recorder that runs on the CPU, and the real one on a GPU."""

import gc
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

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


def test_where_memory_ends_a_call_of_another_kind_drops_what_is_recorded(as_on_a_device):
    graphs = Graphs(budget=100, record=Recorder())
    for _ in range(2):
        run(graphs, 3)

    def large(x):
        if graphs.recordings:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x + 1

    with torch.no_grad():
        assert torch.equal(graphs("forward", large, x=torch.ones(4)), torch.full((4,), 2.0))
        with pytest.raises(torch.OutOfMemoryError):
            graphs("other", lambda x: (_ for _ in ()).throw(torch.OutOfMemoryError()), x=torch.ones(5))


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


class CudaGraph:
    def replay(self):
        pass


class Torch:
    """What torch does at a recording, without a device: pools by their living graphs, cuBLAS's workspace by stream."""

    def __init__(self):
        self.living, self.pools, self.workspace, self.used = {}, 0, None, []
        self.recording = None

    def install(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", self.new_pool)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", CudaGraph)
        monkeypatch.setattr(torch.cuda, "graph", self.record)
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", self.forget, raising=False)

    def new_pool(self):
        self.pools += 1
        return self.pools

    def forget(self):
        self.workspace = None

    @contextmanager
    def record(self, graph, *, pool, capture_error_mode):
        assert self.recording is None, "one stream records one graph"
        # A pool that was used once still holds something, a workspace say, when its last graph is gone.
        graphs = self.living.setdefault(pool, [])
        assert not graphs or any(one() for one in graphs), "use_count > 0 INTERNAL ASSERT FAILED"
        self.recording = pool
        yield
        graphs.append(weakref.ref(graph))
        self.recording = None

    def multiply(self, x):
        time.sleep(0.01)  # another thread comes meanwhile
        if self.recording:  # not on the stream of other calls
            self.workspace = self.workspace or self.recording
            self.used.append((self.recording, self.workspace))
        return x * 2


@pytest.fixture
def recording(as_on_a_device, monkeypatch):
    torch_like = Torch()
    torch_like.install(monkeypatch)
    return torch_like


def recorded_twice(graphs, segment):
    with torch.no_grad():
        for _ in range(2):
            graphs("forward", segment, x=torch.rand(2))


def test_what_was_dropped_is_recorded_again(recording):
    graphs = Graphs(budget=100)
    for _ in range(2):
        recorded_twice(graphs, lambda x: x + 1)
        assert len(graphs.recordings) == 1
        graphs.clear()


def test_recordings_that_live_share_their_pool(recording):
    graphs = Graphs(budget=100)
    for name in ("one", "two"):
        with torch.no_grad():
            for _ in range(2):
                graphs(name, lambda x: x + 1, x=torch.rand(2))
    assert len(graphs.recordings) == 2
    assert recording.pools == 1


def test_a_recording_holds_no_workspace_of_anothers_pool(recording):
    """Dropping the other would take it away: every graph is recorded on the same stream, to which torch ties it."""
    for _ in range(2):
        recorded_twice(Graphs(budget=100), recording.multiply)
    assert recording.workspace is None
    assert recording.used == [(1, 1), (2, 2)]


def test_nothing_is_collected_while_it_records(recording):
    seen = []

    def segment(x):
        seen.append((bool(recording.recording), gc.isenabled()))
        if x.numel() == 3:
            raise ValueError("it cannot")
        return x + 1

    graphs = Graphs(budget=100)
    recorded_twice(graphs, segment)
    assert seen == [(False, True), (True, False)]
    with torch.no_grad(), pytest.raises(ValueError, match="it cannot"):
        graphs._record(segment, *tree_flatten({"x": torch.rand(3)}))
    assert gc.isenabled()


def test_threads_record_one_after_the_other(recording):
    both = [Graphs(budget=100) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda graphs: recorded_twice(graphs, recording.multiply), both))
    assert [len(graphs.recordings) for graphs in both] == [1, 1]


@pytest.mark.gpu
def test_a_recording_outlives_anothers_on_a_gpu():
    """A product of few outputs and many terms is summed in cuBLAS's workspace."""

    def product(x):
        return x.mT @ x

    mine, others = Graphs(budget=2**30), Graphs(budget=2**30)
    x = torch.randn(32768, 640, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        expected = product(x)
        for graphs in (others, mine):
            for _ in range(2):
                graphs("forward", product, x=x)
        others.clear()
        torch.cuda.empty_cache()
        taken = torch.zeros(2**26, device="cuda")
        torch.testing.assert_close(mine("forward", product, x=x), expected)
        assert not taken.any()
        for _ in range(2):
            torch.testing.assert_close(others("forward", product, x=x), expected)
        assert len(others.recordings) == 1
