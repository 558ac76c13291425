"""Modulation made for all steps of a request in its first: found by time, and computed where it was not foreseen."""

from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch

import vivace
from vivace.attention.native import NATIVE
from vivace.families import FAMILIES
from vivace.fused import foresight, fused_of
from vivace.fused.elementwise import KERNELS, TORCH
from vivace.fused.foresight import Foreseen
from vivace.quant import format_of
from vivace.quant.linear import QuantLinear
from vivace.request import open_request

BOTH = pytest.mark.parametrize("name", ["flux", "qwen_image"])
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def transformer(name, **fields):
    torch.manual_seed(0)
    model = FAMILIES[name].tiny().transformer.eval().requires_grad_(False)
    if fields:
        model = type(model)(**{**model.config, **fields}).eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model


def inputs(model, name, *, time, batch=2):
    kwargs = FAMILIES[name].inputs(model, size=(32, 48), batch=batch, text_tokens=7)
    return {**kwargs, "timestep": torch.tensor(time)}


@pytest.fixture(autouse=True)
def _interpreted():
    """The kernels' references serve here: tests/kernels has the one that this is about."""


@pytest.fixture
def with_kernels(monkeypatch):
    monkeypatch.setattr("vivace.fused.contract.elementwise_for", lambda device: KERNELS)


@pytest.fixture
def found(monkeypatch):
    """For each call, how many of its samples found their modulation made."""
    calls, at = [], Foreseen.at

    def noted(self, time):
        made = at(self, time)
        calls.append(None if made is None else int(made.found.sum()))
        return made

    monkeypatch.setattr(Foreseen, "at", noted)
    return calls


def counted_products(monkeypatch) -> list[int]:
    """Rows of the modulation that were computed, call by call."""
    from vivace.fused import stack

    computed, linear = [], stack.few_rows_linear

    def noted(x, values, *, found=None, **rest):
        computed.append(len(x) if found is None else int((~found).sum()))
        return linear(x, values, found=found, **rest)

    monkeypatch.setattr(stack, "few_rows_linear", noted)
    return computed


@pytest.mark.parametrize(
    ("name", "call"),
    [("flux", {}), ("qwen_image", {"negative_prompt": " ", "true_cfg_scale": 3.0})],
    ids=["flux", "qwen_image, guidance in two calls"],
)
def test_every_step_of_a_pipeline_finds_its_modulation(name, call, with_kernels, found):
    pipe = FAMILIES[name].tiny()
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": "a frog", "height": 32, "width": 32, "num_inference_steps": 3, "output_type": "latent", **call}

    def draw():
        return pipe(**call, generator=torch.Generator().manual_seed(0)).images

    stock = draw()
    vivace.accelerate(pipe, "exact")
    torch.testing.assert_close(draw(), stock, **CLOSE)
    assert found == (6 if name == "qwen_image" else 3) * [1]


@BOTH
def test_a_time_that_nobody_foresaw_is_computed(name, with_kernels, found, monkeypatch):
    computed = counted_products(monkeypatch)
    model = transformer(name)
    calls = [inputs(model, name, time=times) for times in ([0.5, 0.5], [0.25, 0.25], [0.25, 0.4], [0.4, 0.4])]
    calls = [{**calls[0], "timestep": call["timestep"]} for call in calls]
    stock = [model(**call)[0] for call in calls]
    vivace.accelerate(model, "exact")
    with open_request(scheduler=SimpleNamespace(timesteps=torch.tensor([500.0, 250.0, 0.0]))), torch.no_grad():
        for call, expected in zip(calls, stock, strict=True):
            torch.testing.assert_close(model(**call)[0], expected, **CLOSE)
    assert found == [2, 2, 1, 0]
    assert computed == [0, 0, 1, 2]


def test_time_zero_of_the_pictures_to_edit(with_kernels, found):
    model = transformer("qwen_image", zero_cond_t=True)
    call = inputs(model, "qwen_image", time=[0.5, 0.5])
    stock = model(**call)[0]
    vivace.accelerate(model, "exact")
    with open_request(scheduler=SimpleNamespace(timesteps=torch.tensor([500.0, 250.0]))), torch.no_grad():
        torch.testing.assert_close(model(**call)[0], stock, **CLOSE)
    assert found == [2]


@BOTH
@pytest.mark.parametrize("quant", [None, "int8_weights", "fp8"])
def test_blocks_by_and_by_and_quantised(name, quant):
    """As a cache lets them run; int8 that is only stored is read as it is, and other formats foresee nothing."""
    model, fused = transformer(name), fused_of(FAMILIES[name])
    if quant:
        outside = set(map(id, fused.outside(model)))
        for path, module in list(model.named_modules()):
            if id(module) in outside:
                parent, _, last = path.rpartition(".")
                layer = QuantLinear.of(module, format=format_of(quant))
                owner = model.get_submodule(parent)
                owner.__setattr__(last, layer) if not last.isdigit() else owner.__setitem__(int(last), layer)
    call = inputs(model, name, time=[0.5, 0.25])
    with ExitStack() as undo, torch.no_grad():
        split = fused.fuse(model, attend=NATIVE.attend, undo=undo, elementwise=KERNELS)
        once = split.prepare(call)
        foreseen = split.foresight(torch.tensor([500.0, 250.0, 100.0]), once, call)
        assert (foreseen is None) == (quant == "fp8")
        if foreseen is None:
            return
        expected = split(**call, once=once)[0]
        state = split.prologue(**call, once={**once, "made": foreseen.at(call["timestep"])})
        for first, last in ((0, 1), (1, None)):
            state = split.through(state, first, last)
        # The table's rows come of the unpacked weight, a few rows of the packed one: rounded apart by a bit of bf16.
        close = {"rtol": 0.02, "atol": 0.05} if quant else CLOSE
        torch.testing.assert_close(split.epilogue(state)[0], expected, **close)


def test_where_nothing_is_foreseen(monkeypatch):
    model, fused = transformer("flux"), fused_of(FAMILIES["flux"])
    call = inputs(model, "flux", time=[0.5, 0.5])
    times = torch.tensor([500.0, 250.0])
    with ExitStack() as undo, torch.no_grad():
        assert fused.fuse(model, attend=NATIVE.attend, undo=undo, elementwise=TORCH).foresight is None
    with ExitStack() as undo, torch.no_grad():
        split = fused.fuse(model, attend=NATIVE.attend, undo=undo, elementwise=KERNELS)
        once = split.prepare(call)
        foresee = split.foresight
        assert foresee(times[:1], once, call) is None
        assert foresee(times, once, {**call, "timestep": torch.tensor(0.5)}) is None
        assert foresee(times, once, call).at(torch.tensor([0.5])) is None
        monkeypatch.setattr(foresight, "LARGEST", 1000)
        assert foresee(times, once, call) is None
