"""The graph layer: segments of a denoiser call as CUDA graphs, one per input signature."""

from __future__ import annotations

import gc
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

from vivace import request
from vivace.autocast import autocast_type

SEEN = 256
"""Signatures of which it is remembered that they came once: a graph is recorded at the second call."""


@dataclass(kw_only=True)
class Recording:
    """One recorded segment: fill `inputs`, call `replay`, read `output`."""

    inputs: list[torch.Tensor]  # static, outside the pool
    output: Any
    replay: Callable[[], None]
    nbytes: int  # of device memory that goes back when the recording is dropped

    def fill(self, tensors: Sequence[torch.Tensor]) -> None:
        """Copy `tensors` into the inputs: those of one type in one launch."""
        kinds: dict[torch.dtype, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for pair in zip(self.inputs, tensors, strict=True):
            kinds.setdefault(pair[0].dtype, []).append(pair)
        for pairs in kinds.values():
            static, given = zip(*pairs, strict=True)
            torch._foreach_copy_(static, given)


HOST = "cpu"
"""Tensors there are read by the program, not by recorded kernels."""

Record = Callable[[Callable[..., Any], list[Any], TreeSpec], Recording]


class Graphs:
    """Runs segments as CUDA graphs within a byte budget; the least recently used recording goes first.

    A signature is the shapes, strides, types and devices of the tensors among the arguments and the values of all
    others. Its first call runs as it is, which warms up libraries and autotuners; the second is recorded. Recordings
    share one memory pool, so the result is copied out before another may run; a lock keeps threads apart.
    """

    def __init__(self, *, budget: int, record: Record | None = None) -> None:
        self.budget = budget
        self.recordings: OrderedDict[Hashable, Recording] = OrderedDict()
        self._seen: OrderedDict[Hashable, None] = OrderedDict()
        self._record = record or CudaRecorder()
        self._lock = threading.Lock()

    def __call__(self, name: str, segment: Callable[..., Any], /, **kwargs: Any) -> Any:
        """`segment(**kwargs)`, recorded or replayed where its inputs allow; the result is the caller's own."""
        leaves, spec = tree_flatten(kwargs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        # The value of a CPU tensor would be frozen into the recording, and so would a gradient's path, and the casts of
        # weights that autocast remembers only until its block ends.
        devices = {tensor.device for tensor in tensors}
        frozen = torch.is_grad_enabled() or any(autocast_type(device) is not None for device in devices)
        if frozen or any(device.type == HOST for device in devices):
            return segment(**kwargs)
        try:
            key = (name, request.EXACT.get(), spec, *(_describe(leaf) for leaf in leaves))
            hash(key)
        except TypeError:
            return segment(**kwargs)
        with self._lock:
            recording = self.recordings.get(key)
            if recording is None and not self._came_before(key):
                return self._first(segment, kwargs)
            if recording is None:
                recording = self._record(segment, leaves, spec)
                self._keep(key, recording)
            self.recordings.move_to_end(key)
            recording.fill(tensors)
            recording.replay()
            return tree_map_only(torch.Tensor, torch.clone, recording.output)

    def apart(self, segment: Callable[..., Any], /, **kwargs: Any) -> Any:
        """`segment(**kwargs)`, never recorded: it reads more than its arguments."""
        return segment(**kwargs)

    def clear(self) -> None:
        """Drop every recording and its memory."""
        with self._lock:
            self.recordings.clear()
            self._seen.clear()

    @property
    def nbytes(self) -> int:
        """Device memory that the recordings hold."""
        return sum(recording.nbytes for recording in self.recordings.values())

    def _first(self, segment: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """Run a segment as it is; where there is no memory left beside what is recorded, without that."""
        try:
            return segment(**kwargs)
        except torch.OutOfMemoryError:
            if not self.recordings:
                raise
        # Outside of the handler, whose traceback holds what was allocated.
        self.recordings.clear()
        torch.cuda.empty_cache()
        return segment(**kwargs)

    def _came_before(self, key: Hashable) -> bool:
        came = key in self._seen
        self._seen[key] = None
        if len(self._seen) > SEEN:
            self._seen.popitem(last=False)
        return came

    def _keep(self, key: Hashable, recording: Recording) -> None:
        self.recordings[key] = recording
        while self.nbytes > self.budget and len(self.recordings) > 1:
            self.recordings.popitem(last=False)


RECORDING = threading.Lock()
"""One thread records at a time: torch has one stream for it in the whole process."""


class CudaRecorder:
    """Records a segment as a CUDA graph; all graphs of one recorder share one memory pool."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._alive: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def __call__(self, segment: Callable[..., Any], leaves: list[Any], spec: TreeSpec) -> Recording:
        with RECORDING:
            return self._record(segment, leaves, spec)

    def _record(self, segment: Callable[..., Any], leaves: list[Any], spec: TreeSpec) -> Recording:
        if not self._alive:
            # torch refuses a pool whose last graph is gone while anything of it is still held.
            self._pool = torch.cuda.graph_pool_handle()
        static = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        inputs = [leaf for leaf in static if isinstance(leaf, torch.Tensor)]
        reserved = torch.cuda.memory_reserved()
        graph = torch.cuda.CUDAGraph()
        # thread_local: another thread's allocation (a second pipeline, a data loader) must not end the recording.
        capture = torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local")
        with _garbage_stays(), capture, _own_workspaces():
            output = segment(**tree_unflatten(static, spec))
        self._alive.add(graph)
        grown = max(0, torch.cuda.memory_reserved() - reserved)
        held = grown + sum(tensor.nbytes for tensor in inputs)
        return Recording(inputs=inputs, output=output, replay=graph.replay, nbytes=held)


@contextmanager
def _garbage_stays() -> Iterator[None]:
    """No collection of garbage, which may hold page-locked memory or an old recording: freeing them ends a new one."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@contextmanager
def _own_workspaces() -> Iterator[None]:
    """While recording, cuBLAS works in memory of the recording's own pool.

    torch keeps its workspaces by stream, and all graphs are recorded on one: a graph would hold the address of memory
    in the pool of another, and up to torch 2.13 lose it with the next graph that is dropped, whosoever that is.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


def _describe(leaf: Any) -> Hashable:
    if isinstance(leaf, torch.Tensor):
        return (tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device)
    # 1, 1.0 and True are equal as keys, and not the same to a model.
    return (type(leaf), leaf)
