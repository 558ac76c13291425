"""Adapters in the rows and weights of the linears they stand beside: stock's results, and the weights given back."""

import copy
import importlib
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves, tree_map_only

import vivace
from vivace.accelerate import acceleration_of
from vivace.families import FAMILIES
from vivace.fused.elementwise import CUDA, KERNELS
from vivace.lora import room
from vivace.lora.side import side_of

WITH_ROOM = ("flux", "flux2", "sd3", "qwen_image", "z_image", "wan")


def inputs(family, denoiser, *, batch=2):
    return FAMILIES[family].inputs(denoiser, size=(32, 48), batch=batch, frames=1, text_tokens=7, seed=0)


def out(pipe, name, arguments):
    with torch.no_grad():
        return tree_leaves(getattr(pipe, name)(**arguments))[0]


def factors_of(lora_of, denoiser, *, rank=4, seed=1):
    return lora_of(denoiser, rank=rank, seed=seed, std=0.1)


@pytest.fixture
def with_kernels(monkeypatch):
    """Fused blocks over kernels; on the CPU their references."""
    contract = importlib.import_module("vivace.fused.contract")
    monkeypatch.setattr(contract, "elementwise_for", lambda device: KERNELS)


@pytest.fixture
def filled(monkeypatch):
    """How often an input came in rows that have the room (True), or had to be copied into such (False)."""
    counts, lies = Counter(), room._lies_in_rows

    def counted(x, width):
        counts[lies(x, width)] += 1
        return lies(x, width)

    monkeypatch.setattr(room, "_lies_in_rows", counted)
    return counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", WITH_ROOM)
def test_as_stock_computes_them_and_no_input_is_copied(family, dtype, lora_of, with_kernels, filled):
    pipe = FAMILIES[family].tiny()
    name = FAMILIES[family].denoisers[0]
    pipe.to(dtype)
    denoiser = getattr(pipe, name)
    within = "layers" if family == "z_image" else "blocks"
    arguments, factors = inputs(family, denoiser), lora_of(denoiser, prefix=name, within=within, std=0.1)
    stock = copy.deepcopy(pipe)
    plain = out(stock, name, arguments)
    vivace.accelerate(pipe, lora="side")
    for one in (pipe, stock):
        one.load_lora_weights(dict(factors))
    wanted, ours = out(stock, name, arguments), out(pipe, name, arguments)
    assert set(vivace.report(pipe).calls[name]) == {"fused blocks"}
    assert set(filled) == {True}
    if dtype == torch.float32:
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(wanted, plain, atol=1e-2)
    else:
        exact = copy.deepcopy(stock)
        exact.to(torch.float32)
        true = out(exact, name, tree_map_only(torch.Tensor, wide, arguments))
        distances = [(one.float() - true).norm() / true.norm() for one in (ours, wanted)]
        assert distances[0] < 1.3 * distances[1] + 1e-3


def wide(tensor):
    return tensor.float() if tensor.is_floating_point() else tensor


def sides_of(pipe):
    found = map(side_of, pipe.transformer.modules())
    return [side for side in found if side is not None]


@pytest.mark.usefixtures("interpreted")
def test_compiled_kernels_leave_the_room_and_the_gelu_stays_in_its_product(lora_of, monkeypatch, filled):
    contract = importlib.import_module("vivace.fused.contract")
    monkeypatch.setattr(contract, "elementwise_for", lambda device: CUDA)
    products = []
    activated = torch._addmm_activation
    monkeypatch.setattr(torch, "_addmm_activation", lambda *a, **k: products.append(1) or activated(*a, **k))
    pipe = FAMILIES["flux"].tiny()
    arguments, stock = inputs("flux", pipe.transformer), copy.deepcopy(pipe)
    vivace.accelerate(pipe, lora="side")
    for one in (pipe, stock):
        one.load_lora_weights(factors_of(lora_of, stock.transformer))
    # torch's own epilogue is the exact GELU on the CPU
    ours, wanted = out(pipe, "transformer", arguments), out(stock, "transformer", arguments)
    torch.testing.assert_close(ours, wanted, rtol=2e-3, atol=2e-3)
    doubles, singles = len(stock.transformer.transformer_blocks), len(stock.transformer.single_transformer_blocks)
    assert len(products) == 2 * doubles + singles
    assert filled == {True: 4 * doubles + singles}


def test_an_input_without_room_is_copied_into_rows_that_have_it(lora_of, monkeypatch, filled):
    joint = importlib.import_module("vivace.fused.joint")
    monkeypatch.setattr(joint, "asks", lambda *readers: {})
    pipe = FAMILIES["sd3"].tiny()
    arguments, stock = inputs("sd3", pipe.transformer), copy.deepcopy(pipe)
    vivace.accelerate(pipe, lora="side")
    for one in (pipe, stock):
        one.load_lora_weights(factors_of(lora_of, stock.transformer))
    ours, wanted = out(pipe, "transformer", arguments), out(stock, "transformer", arguments)
    torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-3)
    assert filled[False]


def test_some_linears_alone_have_adapters(lora_of):
    """Attention's without the MLP's, and k without q and v."""
    for within in (".attn.", "proj_mlp", "attn.to_k"):
        pipe = FAMILIES["flux"].tiny()
        arguments, stock = inputs("flux", pipe.transformer), copy.deepcopy(pipe)
        factors = lora_of(stock.transformer, within=within, std=0.3)
        vivace.accelerate(pipe, lora="side")
        for one in (pipe, stock):
            one.load_lora_weights(dict(factors))
        ours, wanted = out(pipe, "transformer", arguments), out(stock, "transformer", arguments)
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(ours, out(FAMILIES["flux"].tiny(), "transformer", arguments), atol=1e-4)


def test_biases_of_adapters_join(lora_of):
    pipe = FAMILIES["flux"].tiny()
    arguments, stock = inputs("flux", pipe.transformer), copy.deepcopy(pipe)
    factors = factors_of(lora_of, stock.transformer)
    for key, up in list(factors.items()):
        if "lora_B" in key:
            factors[key.replace(".weight", ".bias")] = torch.randn(len(up)) * 0.3
    without = {key: value for key, value in factors.items() if not key.endswith("lora_B.bias")}
    vivace.accelerate(pipe, lora="side")
    for one in (pipe, stock):
        one.load_lora_weights(dict(factors), adapter_name="biased")
    ours, wanted = out(pipe, "transformer", arguments), out(stock, "transformer", arguments)
    torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-3)
    stock.unload_lora_weights()
    stock.load_lora_weights(without)
    assert not torch.allclose(wanted, out(stock, "transformer", arguments), atol=1e-2)
    before = [side.bias.data_ptr() for side in sides_of(pipe)]
    pipe.set_adapters("biased", 0.5)
    out(pipe, "transformer", arguments)
    assert before == [side.bias.data_ptr() for side in sides_of(pipe)]


def test_strengths_of_requests_keep_their_place(sd3_pipe, lora_of):
    """A recorded graph of these many requests goes on reading there."""
    vivace.accelerate(sd3_pipe, lora="side")
    sd3_pipe.load_lora_weights(lora_of(sd3_pipe.transformer))
    arguments = inputs("sd3", sd3_pipe.transformer)
    places, cleared = [], []
    lane = acceleration_of(sd3_pipe).target.lanes["transformer"]
    lane.run.clear = lambda: cleared.append(len(places))  # what a recorded graph would be told
    for scale in ([0.3, 0.5], [0.9, 0.1], 0.4, [0.2, 0.2], [0.7]):
        made = out(sd3_pipe, "transformer", {**arguments, "joint_attention_kwargs": {"scale": scale}})
        places.append([side.strengths.data_ptr() for side in sides_of(sd3_pipe) if side.strengths is not None])
    assert places[0] == places[1] == places[3]
    assert places[2] == []
    # Only for another number of them, none or one or two, is anything recorded anew.
    assert sorted(set(cleared)) == [0, 2, 3, 4]
    uniform = out(sd3_pipe, "transformer", {**arguments, "joint_attention_kwargs": {"scale": 0.7}})
    torch.testing.assert_close(made, uniform, rtol=1e-4, atol=1e-4)


def test_every_request_of_a_batch_has_its_strengths_in_the_room_too(lora_of, with_kernels):
    pipe = FAMILIES["flux"].tiny()
    vivace.accelerate(pipe, lora="side")
    pipe.load_lora_weights(factors_of(lora_of, pipe.transformer), adapter_name="a")
    arguments = inputs("flux", pipe.transformer)

    def at(scale):
        return out(pipe, "transformer", {**arguments, "joint_attention_kwargs": {"scale": scale}})

    mixed, weak, strong = at([0.2, {"a": 1.5}]), at(0.2), at(1.5)
    torch.testing.assert_close(mixed[0], weak[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[1], strong[1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(weak, strong, atol=1e-2)


@pytest.mark.parametrize("mode", ["merged", "side"])
def test_another_strength_is_no_other_call_to_record(lora_of, mode):
    pipe = FAMILIES["flux"].tiny()
    vivace.accelerate(pipe, lora=mode)
    pipe.load_lora_weights(factors_of(lora_of, pipe.transformer))
    lane, told, made = acceleration_of(pipe).target.lanes["transformer"], [], []
    run = lane.run

    def spy(name, segment, /, **kwargs):
        told.append(tree_map_only(torch.Tensor, lambda tensor: None, kwargs))
        return run(name, segment, **kwargs)

    spy.clear = run.clear
    lane.run = spy
    for scale in (0.2, 0.9):
        arguments = {**inputs("flux", pipe.transformer), "joint_attention_kwargs": {"scale": scale}}
        made.append(out(pipe, "transformer", arguments))
    assert told[0] == told[1]
    assert not torch.allclose(*made, atol=1e-3)


def held(denoiser):
    """Bytes of all storages that a denoiser's parameters lie in."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in denoiser.parameters()}
    return sum(storages.values())


def test_files_and_memory(tmp_path, lora_of):
    pipe = FAMILIES["flux"].tiny()
    transformer = pipe.transformer
    arguments, stock = inputs("flux", transformer), copy.deepcopy(pipe)
    bare = held(transformer)
    vivace.accelerate(pipe, lora="side")
    plain = out(pipe, "transformer", arguments)
    pipe.load_lora_weights(factors_of(lora_of, stock.transformer), adapter_name="style")
    adapted = out(pipe, "transformer", arguments)
    gaps = [name for name, p in transformer.named_parameters() if not p.is_contiguous()]
    assert any("proj_mlp" in name for name in gaps)
    assert any("add_k_proj" in name for name in gaps)
    # No weight lies there twice: what is more is the columns of the adapters' ranks.
    ups = sum(side.up.nbytes for side in sides_of(pipe))
    assert held(transformer) < bare + 4 * ups
    assert held(transformer) < 2 * bare

    assert all(tensor.is_contiguous() for tensor in transformer.state_dict().values())
    pipe.unload_lora_weights()
    transformer.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    wanted = stock.transformer.state_dict()
    saved = load_file(file)
    assert saved.keys() == wanted.keys()
    assert all(torch.equal(saved[name], value) for name, value in wanted.items())

    torch.testing.assert_close(out(pipe, "transformer", arguments), plain)
    assert not torch.allclose(adapted, plain, atol=1e-3)
    assert all(parameter.is_contiguous() for parameter in transformer.parameters())
    vivace.restore(pipe)
    assert held(transformer) == bare
    assert all(torch.equal(value, wanted[name]) for name, value in transformer.state_dict().items())


def test_restored_with_adapters_in_place(lora_of):
    pipe = FAMILIES["flux"].tiny()
    arguments, stock = inputs("flux", pipe.transformer), copy.deepcopy(pipe)
    bare = held(pipe.transformer)
    vivace.accelerate(pipe, lora="side")
    for one in (pipe, stock):
        one.load_lora_weights(factors_of(lora_of, FAMILIES["flux"].tiny().transformer))
    out(pipe, "transformer", arguments)
    vivace.restore(pipe)
    torch.testing.assert_close(out(pipe, "transformer", arguments), out(stock, "transformer", arguments))
    weights = [p for name, p in pipe.transformer.named_parameters() if "lora" not in name]
    assert all(weight.is_contiguous() for weight in weights)
    assert sum(weight.untyped_storage().nbytes() for weight in weights) == bare


def test_addresses_stay_from_adapter_to_adapter(lora_of):
    """Weights', factors' and the input's products: what a recorded graph of them reads."""
    pipe = FAMILIES["flux"].tiny()
    bare, stock = copy.deepcopy(pipe.transformer), copy.deepcopy(pipe)
    arguments, places = inputs("flux", bare), []
    vivace.accelerate(pipe, lora="side")
    lane = acceleration_of(pipe).target.lanes["transformer"]
    splits = []
    for seed, rank in enumerate((16, 4, 9)):
        for one in (pipe, stock):
            one.unload_lora_weights()
            one.load_lora_weights(factors_of(lora_of, bare, seed=seed, rank=rank), adapter_name=f"a{seed}")
        ours, wanted = out(pipe, "transformer", arguments), out(stock, "transformer", arguments)
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-3)
        sides = sides_of(pipe)
        places.append([side.up.data_ptr() for side in sides] + [side.down.data_ptr() for side in sides])
        places[-1] += [parameter.data_ptr() for parameter in pipe.transformer.parameters()]
        splits.append(lane.split)
    assert places[0] == places[1] == places[2]
    assert splits[0] is splits[1] is splits[2]
