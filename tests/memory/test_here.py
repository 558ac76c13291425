"""Fused blocks over weights that come for their step: the same bits, of weights that are where it computes."""

import copy
import importlib
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vivace
from vivace.accelerate import acceleration_of
from vivace.families import FAMILIES
from vivace.fused import FUSED
from vivace.lora.room import Room
from vivace.memory.stream import Stream, Trip

NAMES = ("sdxl", "sd3", "flux", "qwen_image", "wan", "flux2", "z_image", "pixart", "wan_vace")
FEW = ("sdxl", "sd3", "flux", "qwen_image", "wan")


@pytest.fixture
def on_cpu(monkeypatch):
    """Lets the CPU stand for the GPU whose memory is planned."""
    module = importlib.import_module("vivace.accelerate")
    monkeypatch.setattr(module, "device_for", lambda config: torch.device("cpu") if config.vram else None)


@pytest.fixture
def streams(monkeypatch):
    """The streams that are made."""
    made, install = [], Stream.install
    monkeypatch.setattr(Stream, "install", lambda stream, **given: made.append(stream) or install(stream, **given))
    return made


class AtHome(TorchDispatchMode):
    """Fails where anything but a copy reads weights at home: on a GPU they would be out of reach."""

    def __init__(self, stream):
        super().__init__()
        self.homes = {group.host.untyped_storage().data_ptr() for group in stream.groups.values()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        views = any(found.alias_info and not found.alias_info.is_write for found in function._schema.returns)
        if not views and function is not torch.ops.aten.copy_.default:
            for leaf in tree_leaves((args, kwargs)):
                # int8 products of the CPU keep a form of their own, which was made of what was read.
                if isinstance(leaf, torch.Tensor) and not leaf.is_mkldnn:
                    assert leaf.untyped_storage().data_ptr() not in self.homes, f"{function} reads what is at home"
        return function(*args, **(kwargs or {}))


def apart(a, b):
    """The distance of `a` from `b`, as a share of `b`."""
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def denoiser_of(name):
    pipe = FAMILIES[name].tiny()
    return pipe, getattr(pipe, FAMILIES[name].denoisers[0])


def inputs_of(name, denoiser, *, device="cpu"):
    family = FAMILIES[name]
    given = family.inputs(
        denoiser, size=(64, 64), batch=2, frames=5 if family.media == "video" else 1, text_tokens=8, seed=3
    )
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), given)


def out_of(denoiser, given):
    with torch.no_grad():
        out = denoiser(**{**given, "return_dict": False})[0]
        return torch.stack(out) if isinstance(out, list) else out


def lane_of(denoiser):
    return acceleration_of(denoiser).target.lanes["denoiser"]


@contextmanager
def counted(monkeypatch):
    """The copies of a call, each with the block that computes when it begins."""
    copies, copy_one = [], Trip._copy
    with monkeypatch.context() as patch:
        patch.setattr(Trip, "_copy", lambda trip, *given: copies.append(trip.now) or copy_one(trip, *given))
        yield copies


def test_all_that_are_fused_but_one_are_tested():
    assert {*NAMES, "sd", "lcm", "svd"} == set(FUSED)


@pytest.mark.parametrize("quant", ["off", "int8"])
@pytest.mark.parametrize("name", [n if n in FEW else pytest.param(n, marks=pytest.mark.full) for n in NAMES])
def test_the_same_bits_as_with_all_weights_there(name, quant, on_cpu, streams, monkeypatch):
    _, denoiser = denoiser_of(name)
    before = {key: tensor.clone() for key, tensor in denoiser.state_dict().items()}
    given = inputs_of(name, denoiser)
    stock = out_of(denoiser, given)
    vivace.accelerate(denoiser, quant=quant, fuse="on")
    wanted = out_of(denoiser, given)
    vivace.restore(denoiser)
    vivace.accelerate(denoiser, quant=quant, fuse="on", vram="streamed")
    (stream,) = streams
    assert len(stream.groups) > 1
    with AtHome(stream):
        assert torch.equal(out_of(denoiser, given), wanted)
    with counted(monkeypatch) as copies:
        assert torch.equal(out_of(denoiser, given), wanted)
    # In the second call the order is known: each block comes once.
    assert len(copies) == len(stream.groups)
    assert lane_of(denoiser).calls == {"fused blocks": 2}
    for key, tensor in denoiser.state_dict().items():
        assert quant != "off" or torch.equal(tensor, before[key])
    vivace.restore(denoiser)
    assert torch.equal(out_of(denoiser, given), stock)
    assert all(torch.equal(tensor, before[key]) for key, tensor in denoiser.state_dict().items())


def picture(pipe):
    """Its latents: in strips the VAE computes other bits."""
    pipe.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 4, "height": 64, "width": 64, "output_type": "latent"}
    return pipe("a fox", generator=torch.Generator().manual_seed(1), **given).images


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        ("sd3", "firstblock:threshold=0.4"),
        ("flux", "firstblock:threshold=0.4"),
        ("flux", "blockdance:after=1"),
        ("qwen_image", "taylorseer:interval=2"),
        ("sdxl", "deepcache:interval=2"),
    ],
)
def test_a_cache_skips_blocks_that_would_have_come(name, cache, on_cpu, streams):
    wanted, pipe = None, FAMILIES[name].tiny()
    for placed in ({}, {"vram": "streamed"}):
        vivace.accelerate(pipe, cache=cache, fuse="on", **placed)
        pictures = [picture(pipe) for _ in range(2)]
        wanted = wanted or pictures
        assert all(map(torch.equal, pictures, wanted))
    (lane,) = acceleration_of(pipe).target.lanes.values()
    assert lane.cache.to_dict()["hit_rate"] > 0
    stream = next(one for one in streams if one.in_parts)
    with AtHome(stream):
        assert torch.equal(picture(pipe), wanted[0])


@pytest.mark.parametrize("lora", ["merged", "side"])
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_lora_over_streamed_blocks_that_are_fused(name, lora, on_cpu, streams, lora_of, monkeypatch):
    wanted, pipe, widened = None, FAMILIES[name].tiny(), []
    monkeypatch.setattr(
        Room, "widen", lambda room, linears, own=Room.widen: (widened.append(linears), own(room, linears))[1]
    )
    factors = lora_of(pipe.transformer, std=0.3)
    for placed in ({}, {"vram": "streamed"}):
        vivace.accelerate(pipe, lora=lora, fuse="on", **placed)
        pictures, widened[:] = [picture(pipe)], []
        pipe.load_lora_weights(dict(factors), adapter_name="a")
        for strength in (1.0, 0.5):
            pipe.set_adapters("a", strength)
            pictures.append(picture(pipe))
        pipe.unload_lora_weights()
        pictures.append(picture(pipe))
        wanted = wanted or pictures
        # Beside streamed linears, which stay where they lie, the products are others and round otherwise.
        assert bool(widened) == (lora == "side" and not placed)
        for mine, resident in zip(pictures, wanted, strict=True):
            torch.testing.assert_close(mine, resident, rtol=0, atol=0 if lora == "merged" else 1e-3)
    assert not torch.equal(wanted[0], wanted[1])
    (lane,) = acceleration_of(pipe).target.lanes.values()
    assert set(lane.calls) == {"fused blocks"}
    stream = next(one for one in streams if one.in_parts)
    homes = {group.host.untyped_storage().data_ptr() for group in stream.groups.values()}
    joined = [block.attn.to_k.weight.untyped_storage().data_ptr() for block in pipe.transformer.transformer_blocks]
    # What was built again joined nothing anew: all weights are still in the memory that is copied from.
    assert homes.issuperset(joined)


def test_joined_weights_take_no_more_memory(on_cpu, streams):
    _, denoiser = denoiser_of("flux")
    nbytes = sum(tensor.nbytes for tensor in denoiser.state_dict().values())
    vivace.accelerate(denoiser, fuse="on", vram="streamed")
    (stream,) = streams
    placed = stream.held.nbytes + stream.nbytes
    assert nbytes <= placed < 1.2 * nbytes  # small tensors begin at round addresses
    held = stream._arrived.untyped_storage().data_ptr()
    for block in denoiser.transformer_blocks:
        assert block.norm1.linear.weight.untyped_storage().data_ptr() == held


def test_what_cannot_be_fused_is_streamed_as_it_is(on_cpu, streams):
    _, denoiser = denoiser_of("svd")
    given = inputs_of("svd", denoiser)
    stock = out_of(denoiser, given)
    vivace.accelerate(denoiser, vram="streamed")
    note = next(note for note in vivace.report(denoiser).passes if note.name == "fuse")
    assert note.detail == "its fused blocks read each other's weights"
    (stream,) = streams
    with AtHome(stream):
        torch.testing.assert_close(out_of(denoiser, given), stock, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", ["off", "on"])
@pytest.mark.parametrize("quant", ["off", "int8"])
@pytest.mark.parametrize("name", FEW)
def test_the_same_on_a_gpu(name, quant, graphs):
    _, denoiser = denoiser_of(name)
    denoiser.to(torch.bfloat16)
    given = inputs_of(name, denoiser, device="cuda")
    with torch.no_grad():
        resident = copy.deepcopy(denoiser).to("cuda")
    vivace.accelerate(resident, quant=quant, fuse="on", graphs=graphs)
    vivace.accelerate(denoiser, quant=quant, fuse="on", graphs=graphs, vram="streamed")
    times = given["timestep"]
    for share in (1.0, 0.9, 0.8, 0.7, 0.6):
        # The second call is recorded, those after it are replayed.
        now = {**given, "timestep": times * share if isinstance(times, torch.Tensor) else times}
        torch.testing.assert_close(out_of(denoiser, now), out_of(resident, now), rtol=2e-2, atol=2e-2)
    lane = lane_of(denoiser)
    assert lane.calls == {"fused blocks": 5}
    assert graphs == "off" or len(lane.run.recordings) == 1
    vivace.restore(denoiser)
    assert all(tensor.device.type == "cpu" for tensor in denoiser.state_dict().values())


@pytest.mark.gpu
@pytest.mark.parametrize("fields", [{"lora": "merged"}, {"lora": "side"}], ids=lambda fields: fields["lora"])
def test_a_recording_copies_weights_as_they_then_are(fields, lora_of):
    pipe = FAMILIES["sd3"].tiny().to(torch.bfloat16)
    resident = copy.deepcopy(pipe).to("cuda")
    vivace.accelerate(resident, **fields)
    vivace.accelerate(pipe, graphs="on", vram="streamed", **fields)
    plain, factors = picture(resident), lora_of(pipe.transformer, std=0.3)
    for one in (pipe, resident):
        one.load_lora_weights(dict(factors), adapter_name="a")
    for strength in (1.0, 0.3, 1.0):
        for one in (pipe, resident):
            one.set_adapters("a", strength)
        wanted = picture(resident)
        # Beside streamed weights adapters take another way through the same sums.
        assert apart(picture(pipe), wanted) < 0.02 < 0.1 < apart(wanted, plain)


@pytest.mark.gpu
def test_a_cache_records_its_segments_over_streamed_blocks():
    pipe = FAMILIES["flux"].tiny().to(torch.bfloat16)
    resident = copy.deepcopy(pipe).to("cuda")
    vivace.accelerate(resident, cache="firstblock:threshold=0.4")
    vivace.accelerate(pipe, cache="firstblock:threshold=0.4", graphs="on", vram="streamed")
    for _ in range(3):
        torch.testing.assert_close(picture(pipe), picture(resident), rtol=5e-2, atol=5e-2)


@pytest.mark.gpu
def test_stock_blocks_are_recorded_too():
    _, denoiser = denoiser_of("sd3")
    given = inputs_of("sd3", denoiser, device="cuda")
    wanted = out_of(copy.deepcopy(denoiser).to("cuda"), given)
    vivace.accelerate(denoiser, fuse="off", compile="off", graphs="on", vram="streamed")
    for _ in range(4):
        torch.testing.assert_close(out_of(denoiser, given), wanted, rtol=1e-2, atol=1e-2)
    assert len(lane_of(denoiser).run.recordings) == 1
