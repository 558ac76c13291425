"""The compatibility matrix: every pass on every family, and every pair of passes on a UNet and on joint attention.

What is asked for together works, close to stock and reversible to the bit, or is refused before anything changes.
"""

import gc
import itertools
from collections import Counter
from functools import partial

import pytest
import torch
from torch.utils._pytree import tree_leaves

import vivace
from vivace import InputError
from vivace.families import FAMILIES
from vivace.fused import FUSED
from vivace.passes import PASSES
from vivace.passes.channels_last import convolutions

ASKED = {
    "attention": {"check_nan": True},
    "lora": {"lora": "side"},
    "channels_last": {"channels_last": "on"},
    "quant": {"quant": "int8"},
    "fuse": {"fuse": "on"},
    "compile": {"compile": "on"},
    "cache": {"cache": "steps:compute=0-9"},
    "graphs": {"graphs": "on"},
    "vae": {"vae": "on"},
    "prompts": {"prompts": "on"},
    "encoders": {"encoders": "int8_weights"},
}
"""The fields that ask for each pass."""

REFUSED = {
    "graphs on a CPU": lambda asked, family, device: "graphs" in asked and device == "cpu",
    "graphs under the NaN guard": lambda asked, family, device: {"graphs", "attention"} <= asked,
    "adapters for what takes none": lambda asked, family, device: (
        "lora" in asked and not hasattr(models(family)[0], "load_lora_adapter")
    ),
    "compiling what is fused": lambda asked, family, device: {"fuse", "compile"} <= asked,
    "fusing what has no fused blocks": lambda asked, family, device: "fuse" in asked and family not in FUSED,
    "an order of pixels without convolutions": lambda asked, family, device: (
        "channels_last" in asked and not any(map(convolutions, models(family)))
    ),
    "prompts without words": lambda asked, family, device: (
        asked & {"prompts", "encoders"} and not any("text_encoder" in name for name in tiny(family).components)
    ),
}
"""Everything that is refused; all else has to work."""

UNET, JOINT = "sd", "flux"
# Of a tiny random model's output in 8 bits; Stable Video Diffusion's turns 1 % of noise on its input into 21 %.
FAR = {"svd": 0.4}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# What the blocks compute with; the others leave a trace as it is, or its guards would have it made anew.
TRACED = {"attention", "lora", "channels_last", "quant", "compile"}
SETS = sorted(
    (frozenset(names) for count in range(4) for names in itertools.combinations(ASKED, count)),
    key=lambda asked: sorted(asked & TRACED),
)


def models(family):
    pipe = tiny(family)
    return [getattr(pipe, FAMILIES[family].denoisers[0]), *filter(None, [getattr(pipe, "vae", None)])]


PIPES = {}


def tiny(family):
    """The family's tiny pipeline, one for all tests: each leaves it as it was."""
    if family not in PIPES:
        PIPES[family] = FAMILIES[family].tiny()
    return PIPES[family]


def cases(*, full):
    """(family, what is asked for): singles on every family, pairs on two; all triples in the full product."""
    for family, asked in itertools.product(FAMILIES, SETS):
        often = len(asked) == 1 or (len(asked) == 2 and family in (UNET, JOINT))
        # Tracing takes seconds, a UNet's many kinds of blocks above all: joint attention shows those that trace anew.
        kept = family == JOINT or (family == UNET and len(asked & TRACED - {"channels_last"}) == 1)
        slow = "compile" in asked and not kept and not {"graphs", "fuse"} & asked
        marks = () if often and not slow else pytest.mark.full
        if full or not marks:
            yield pytest.param(family, asked, id=f"{family}-{'+'.join(sorted(asked)) or 'nothing'}", marks=marks)


def pytest_generate_tests(metafunc):
    # Thousands, which take time to be left out again.
    if "asked" in metafunc.fixturenames:
        full = metafunc.config.option.markexpr != "not full"
        metafunc.parametrize(("family", "asked"), [*cases(full=full)])


def refused(asked, family, device):
    return any(rule(asked, family, device) for rule in REFUSED.values())


@pytest.fixture(scope="module")
def traces():
    """Whose traces there are."""
    yield []
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _trace_only(monkeypatch, request, traces):
    # The tracer is the real one; the code generator would take half a minute.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    case = getattr(request.node, "callspec", None)
    if case and "compile" in case.params.get("asked", ()):
        whose = [case.params["family"], case.params["device"], case.params["asked"] & TRACED]
        if whose != traces:
            torch._dynamo.reset()
            traces[:] = whose


def test_every_pass_is_in_the_matrix():
    # test_vram and test_compatibility pair placing weights, which needs a GPU or a stand-in, with the others;
    # accumulating in 16 bit is a GPU's own.
    assert set(ASKED) == {one.name for one in PASSES} - {"vram", "accumulate"}


@pytest.mark.parametrize("device", DEVICES)
def test_works_or_is_refused(family, asked, device):
    pipe = tiny(family).to(device)
    name = FAMILIES[family].denoisers[0]
    denoiser = getattr(pipe, name)
    arguments = FAMILIES[family].inputs(denoiser, size=(64, 64), batch=1, frames=1, text_tokens=8, seed=0)
    fields = {field: value for one in sorted(asked) for field, value in ASKED[one].items()}
    with torch.no_grad():
        stock = outputs(denoiser, arguments)
        if refused(asked, family, device):
            before = type(pipe), dict(vars(denoiser)), {k: v.data_ptr() for k, v in denoiser.state_dict().items()}
            with pytest.raises(InputError):
                vivace.accelerate(pipe, **fields)
            after = type(pipe), dict(vars(denoiser)), {k: v.data_ptr() for k, v in denoiser.state_dict().items()}
            assert after == before
            return
        vivace.accelerate(pipe, **fields)
        done = {note.name for note in vivace.report(pipe).passes if note.done}
        fast = [outputs(denoiser, arguments) for _ in range(3)]
        vivace.restore(pipe)
        assert asked <= done
        for each in fast:
            for ours, theirs in zip(each, stock, strict=True):
                bound = FAR.get(family, 0.2) if "quant" in asked else 1e-3 if device == "cpu" else 1e-2
                assert (ours - theirs).norm() <= bound * theirs.norm()
        assert all(map(torch.equal, outputs(denoiser, arguments), stock))


def outputs(denoiser, arguments):
    return [leaf for leaf in tree_leaves(denoiser(**arguments)) if isinstance(leaf, torch.Tensor)]


@pytest.mark.usefixtures("young")
@pytest.mark.parametrize("family", [UNET, JOINT])
def test_ten_cycles_leave_memory_flat(family):
    pipe = tiny(family).to("cpu")
    denoiser = getattr(pipe, FAMILIES[family].denoisers[0])
    arguments = FAMILIES[family].inputs(denoiser, size=(64, 64), batch=1, frames=1, text_tokens=8, seed=0)

    def cycle():
        vivace.accelerate(pipe, channels_last="on" if family == UNET else "auto")
        with torch.no_grad():
            denoiser(**arguments)
        vivace.restore(pipe)
        gc.collect()

    def held():
        objects = gc.get_objects()
        tensors = [thing for thing in objects if type(thing) in (torch.Tensor, torch.nn.Parameter)]
        storages = [t.untyped_storage() for t in tensors if t.layout is torch.strided and not t.is_meta]
        ours = Counter(type(thing).__name__ for thing in objects if str(type(thing).__module__).startswith("vivace."))
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()), ours

    cycle()
    before = held()
    for _ in range(10):
        cycle()
    assert held() == before
