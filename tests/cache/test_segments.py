"""The segments that caches declare, recorded as CUDA graphs are: fixed inputs, outputs that a replay overwrites."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

import vivace
from vivace import request
from vivace.accelerate import acceleration_of
from vivace.families import FAMILIES
from vivace.fused.elementwise import KERNELS
from vivace.fused.stack import Stack
from vivace.graph import Graphs, Recording

POLICIES = (
    "firstblock:threshold=0.4",
    "firstblock:threshold=0.4,order=1",
    "teacache:threshold=0.5,coefficients=1+0",
    "dicache:threshold=0.5",
    "magcache:ratios=1+1.01+1.01+0.99,threshold=0.2",
    "steps:compute=0-3,5,7,9,11,order=2",
    "taylorseer:interval=3",
    "meancache:of50=17",
    "blockdance:after=1",
    "guidance:every=2",
)


class Recorder:
    def __init__(self):
        self.names = []

    def __call__(self, segment, leaves, spec):
        static = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        inputs = [leaf for leaf in static if isinstance(leaf, torch.Tensor)]
        output = segment(**tree_unflatten(static, spec))
        outputs = [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, torch.Tensor)]

        def replay():
            again = tree_flatten(segment(**tree_unflatten(static, spec)))[0]
            fresh = [leaf.clone() for leaf in again if isinstance(leaf, torch.Tensor)]
            for old, new in zip(outputs, fresh, strict=True):
                old.copy_(new)

        return Recording(inputs=inputs, output=output, replay=replay, nbytes=1)


@pytest.mark.parametrize("spelled", POLICIES)
@pytest.mark.parametrize("fuse", ["on", "off"])
def test_recorded_segments_give_what_direct_ones_do(pipe, draw, last, monkeypatch, spelled, fuse):
    # A CPU tensor's value would be frozen into a real recording.
    monkeypatch.setattr("vivace.graph.HOST", "elsewhere")
    vivace.accelerate(pipe, cache=spelled, fuse=fuse)
    direct, skipped = [draw(pipe, seed=seed) for seed in (0, 1)], last(pipe)["skipped_steps"]
    lane = acceleration_of(pipe).target.lanes["transformer"]
    lane.run = Graphs(budget=1000, record=Recorder())
    for seed, expected in enumerate(direct):
        torch.testing.assert_close(draw(pipe, seed=seed), expected, rtol=1e-5, atol=1e-5)
    assert last(pipe)["skipped_steps"] == skipped
    recorded = [key[0] for key in lane.run.recordings]
    assert recorded
    # One recording a segment: nothing that changes from step to step is in its signature.
    assert len(recorded) <= 2 * len(set(recorded))


def test_a_policy_that_works_in_modules_is_not_recorded(pipe, draw, last, monkeypatch):
    monkeypatch.setattr("vivace.graph.HOST", "elsewhere")
    vivace.accelerate(pipe, cache="pab:warmup=2,cooldown=2")
    direct = draw(pipe)
    lane = acceleration_of(pipe).target.lanes["transformer"]
    lane.run = Graphs(budget=1000, record=Recorder())
    assert torch.equal(draw(pipe), direct)
    assert not lane.run.recordings


@pytest.mark.parametrize("spelled", ["firstblock:threshold=1000", "teacache:threshold=1000,coefficients=1+0"])
def test_a_skipped_step_reads_little_modulation_and_a_computed_one_reads_it_once(pipe, last, monkeypatch, spelled):
    denoiser = vivace.accelerate(pipe.transformer, cache=spelled)
    (lane,) = acceleration_of(denoiser).target.lanes.values()
    modulation = lane.split.ready.__self__
    norms, rows, call = set(modulation.stack.linears), [], Stack.__call__

    def counting(stack, x):
        if norms.issuperset(stack.linears):
            rows[-1] += sum(linear.out_features for linear in stack.linears)
        return call(stack, x)

    monkeypatch.setattr(Stack, "__call__", counting)
    x, text, pooled = (torch.randn(1, *shape) for shape in ((16, 8, 8), (9, 64), (64,)))
    with request.open_request(times=(1000.0, 500.0)) as now, torch.no_grad():
        for now.step, time in enumerate((1000.0, 500.0)):
            rows.append(0)
            denoiser(x, text, pooled, torch.tensor([time]), return_dict=False)
    assert last(denoiser)["skipped"] == 1
    whole = sum(linear.out_features for linear in norms)
    always = sum(linear.out_features for linear in modulation.stack.linears[:3])  # the output's and the first block's
    assert rows == [whole, always]


NO_KERNEL = {"aten::new_empty", "aten::empty", "aten::_unsafe_view", "aten::_local_scalar_dense"}


class Launches(TorchDispatchMode):
    """The operators for which a GPU would launch something; one of ours is one."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func._schema.name not in NO_KERNEL:
            self.found.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("spelled", "most"), [("firstblock:", 36), ("teacache:coefficients=1+0,", 23)])
def test_a_skipped_step_of_flux_launches_little(monkeypatch, last, spelled, most):
    monkeypatch.setattr("vivace.fused.contract.elementwise_for", lambda device: KERNELS)
    denoiser = FAMILIES["flux"].tiny().transformer
    given = FAMILIES["flux"].inputs(denoiser, size=(64, 64), batch=1, frames=1, text_tokens=9, seed=0)
    vivace.accelerate(denoiser, cache=f"{spelled}threshold=1000")
    found = []
    with request.open_request(times=(1.0, 0.9, 0.8)) as now, torch.no_grad():
        for now.step, time in enumerate((1.0, 0.9, 0.8)):
            at = {**given, "timestep": torch.full_like(given["timestep"], time)}
            with Launches() as launches:
                denoiser(**at)
            found.append(launches.found)
    assert last(denoiser)["skipped_steps"] == [1, 2]
    computed, *skipped = map(len, found)
    assert max(skipped) <= most < computed, found[-1]


@pytest.mark.parametrize("family", ["flux", "sd3", "qwen_image"])
def test_a_skipped_step_ends_no_text_and_a_computed_one_does_so_once(family, monkeypatch, last):
    denoiser = FAMILIES[family].tiny().transformer
    given = FAMILIES[family].inputs(denoiser, size=(64, 64), batch=1, frames=1, text_tokens=9, seed=0)
    given = {name: value for name, value in given.items() if value is not None}
    with torch.no_grad():
        exact = denoiser(**given)[0]
    vivace.accelerate(denoiser, cache="firstblock:threshold=1000")
    (lane,) = acceleration_of(denoiser).target.lanes.values()
    streams, first = [], lane.split.blocks[0].forward
    first = getattr(first, "args", (first,))[0]  # SD3's may be skipped by the call
    stream = first._stream
    monkeypatch.setattr(first, "_stream", lambda one, *rest: (streams.append(one), stream(one, *rest))[1])
    with request.open_request(times=(1.0, 0.9)) as now, torch.no_grad():
        now.step = 0
        torch.testing.assert_close(denoiser(**given)[0], exact, rtol=1e-4, atol=1e-4)
        assert streams == [first.image, first.text]
        now.step = 1
        denoiser(**given)
    assert streams == [first.image, first.text, first.image]
    assert last(denoiser)["skipped_steps"] == [1]
