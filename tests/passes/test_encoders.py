"""Text encoders stored in few bits: near the stock embeddings, smaller, and back to the bit."""

import importlib

import pytest
import torch
from torch.utils._pytree import tree_leaves

import vivace
from vivace import InputError
from vivace.families import FAMILIES
from vivace.quant.linear import QuantLinear


def note(pipe):
    return next(note for note in vivace.report(pipe).passes if note.name == "encoders")


def encoded(pipe):
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(pipe.encode_prompt("a fox")) if isinstance(leaf, torch.Tensor)]


def packed(pipe):
    return sum(isinstance(m, QuantLinear) for n, e in pipe.components.items() if "encoder" in n for m in e.modules())


@pytest.mark.parametrize("family", ["sdxl", "flux", "qwen_image", "z_image", "wan"])
@pytest.mark.parametrize("format", ["int8_weights", "fp8_weights"])
def test_near_and_back(family, format):
    pipe = FAMILIES[family].tiny()
    stock = encoded(pipe)
    weights = {n: {k: t.clone() for k, t in e.state_dict().items()} for n, e in encoders(pipe)}
    vivace.accelerate(pipe, encoders=format)
    assert f"{format}: {packed(pipe)} linears of text_encoder" in note(pipe).detail
    assert packed(pipe) > 6
    for ours, theirs in zip(encoded(pipe), stock, strict=True):
        if theirs.is_floating_point() and theirs.any():
            assert 0 < (ours - theirs).norm() < 0.1 * theirs.norm()
    vivace.restore(pipe)
    assert packed(pipe) == 0
    assert all(map(torch.equal, encoded(pipe), stock))
    for name, encoder in encoders(pipe):
        assert all(torch.equal(tensor, weights[name][key]) for key, tensor in encoder.state_dict().items())


def encoders(pipe):
    return [(n, m) for n, m in pipe.components.items() if n.startswith("text_encoder") and m is not None]


@pytest.mark.parametrize("fields", [{}, {"vram": "8GB"}], ids=["", "placed"])
def test_weights_that_are_not_finite_are_named(fields, monkeypatch):
    module = importlib.import_module("vivace.accelerate")
    monkeypatch.setattr(module, "device_for", lambda config: torch.device("cpu") if config.vram else None)
    pipe = FAMILIES["sdxl"].tiny()
    name = next(n for n, m in pipe.text_encoder_2.named_modules() if n.endswith("layers.1.mlp.fc1"))
    pipe.text_encoder_2.get_submodule(name).weight.data[3, 5] = float("nan")
    with pytest.raises(InputError, match=rf"text_encoder_2\.{name}\.weight holds NaN or infinity"):
        vivace.accelerate(pipe, encoders="int8_weights", **fields)
    assert packed(pipe) == 0


def test_what_is_kept_in_float32_stays():
    pipe = FAMILIES["flux"].tiny().to(torch.bfloat16)
    for block in pipe.text_encoder_2.encoder.block:
        block.layer[-1].DenseReluDense.wo.float()
    vivace.accelerate(pipe, encoders="int8_weights")
    names = {n for n, m in pipe.text_encoder_2.named_modules() if isinstance(m, QuantLinear)}
    assert names
    assert not any(name.endswith("wo") for name in names)
    encoded(pipe)
    vivace.restore(pipe)


def test_attention_is_said_where_nothing_is_changed():
    pipe = FAMILIES["sd3"].tiny()
    vivace.accelerate(pipe)
    assert not note(pipe).done
    assert "attention text_encoder sdpa" in note(pipe).detail
    vivace.restore(pipe)


def test_with_a_budget_of_memory(monkeypatch):
    import importlib

    module = importlib.import_module("vivace.accelerate")
    monkeypatch.setattr(module, "device_for", lambda config: torch.device("cpu") if config.vram else None)
    pipe = FAMILIES["sdxl"].tiny()
    stock = encoded(pipe)
    vivace.accelerate(pipe, encoders="int8_weights", vram="encoders")
    assert (encoded(pipe)[0] - stock[0]).norm() < 0.1 * stock[0].norm()
    vivace.restore(pipe)
    assert all(map(torch.equal, encoded(pipe), stock))


def test_refusals_and_the_plan():
    with pytest.raises(InputError, match="there is no text encoder"):
        vivace.accelerate(FAMILIES["svd"].tiny(), encoders="int8_weights")
    full = vivace.plan("flux", device="cpu", dtype="bfloat16")
    small = vivace.plan("flux", encoders="int8_weights", device="cpu", dtype="bfloat16")
    assert small.weight_bytes < full.weight_bytes - 3.5e9
    assert "int8_weights" in str(small)


def test_quantised_by_another_library_is_refused():
    pipe = FAMILIES["sdxl"].tiny()
    foreign = type("Linear4bit", (torch.nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    next(m for m in pipe.text_encoder.modules() if type(m) is torch.nn.Linear).__class__ = foreign
    with pytest.raises(
        InputError, match="quantised by bitsandbytes already; load it in 16 bit, or leave encoders='off'"
    ):
        vivace.accelerate(pipe, encoders="int8_weights")


def test_what_fails_halfway_is_put_back(monkeypatch):
    pipe, made, of = FAMILIES["sdxl"].tiny(), [], QuantLinear.of.__func__

    def scarce(cls, linear, **how):
        if len(made) == 9:
            raise torch.OutOfMemoryError("no memory left")
        made.append(of(cls, linear, **how))
        return made[-1]

    monkeypatch.setattr(QuantLinear, "of", classmethod(scarce))
    with pytest.raises(torch.OutOfMemoryError):
        vivace.accelerate(pipe, encoders="int8_weights")
    assert len(made) == 9
    assert packed(pipe) == 0


def with_style(pipe, lora_of):
    """A LoRA of the denoiser's blocks and of both text encoders."""
    parts = {"unet": "blocks", "text_encoder": "self_attn", "text_encoder_2": "self_attn"}
    made = [lora_of(getattr(pipe, name), prefix=name, within=within, std=0.3) for name, within in parts.items()]
    return {key: value for each in made for key, value in each.items()}


@pytest.mark.parametrize("fields", [{}, {"vram": "encoders"}, {"quant": "int8"}], ids=["", "placed", "int8"])
@pytest.mark.parametrize("first", ["load", "accelerate"])
def test_adapters_of_the_encoders_come_and_go(first, fields, lora_of, monkeypatch):
    module = importlib.import_module("vivace.accelerate")
    monkeypatch.setattr(module, "device_for", lambda config: torch.device("cpu") if config.vram else None)
    pipe = FAMILIES["sdxl"].tiny()
    file, stock = with_style(pipe, lora_of), encoded(pipe)[0]
    pipe.load_lora_weights(dict(file))
    styled = encoded(pipe)[0]
    assert (styled - stock).norm() > 0.2 * stock.norm()
    if first == "accelerate":
        pipe.unload_lora_weights()
    vivace.accelerate(pipe, encoders="int8_weights", **fields)
    if first == "accelerate":
        pipe.load_lora_weights(dict(file))
    for _ in range(2):
        assert (encoded(pipe)[0] - styled).norm() < 0.1 * stock.norm()
        pipe.unload_lora_weights()
        assert 0 < (encoded(pipe)[0] - stock).norm() < 0.1 * stock.norm()
        assert packed(pipe) > 6
        pipe.load_lora_weights(dict(file), adapter_name="style")
    vivace.restore(pipe)
    assert packed(pipe) == 0
    torch.testing.assert_close(encoded(pipe)[0], styled, rtol=1e-5, atol=1e-5)
    pipe.unload_lora_weights()
    torch.testing.assert_close(encoded(pipe)[0], stock, rtol=1e-5, atol=1e-5)


def test_restored_wherever_adapters_left_the_linears(lora_of):
    """Through another pipeline of the same parts, whose methods know nothing of it."""
    pipe = FAMILIES["sdxl"].tiny()
    stock = encoded(pipe)[0]
    pipe.load_lora_weights(with_style(pipe, lora_of))
    vivace.accelerate(pipe, encoders="int8_weights")
    other = type(pipe)(**pipe.components)
    with pytest.raises(InputError, match="are quantised, so nothing can be fused into them"):
        pipe.fuse_lora(components=["text_encoder"])
    other.unload_lora_weights()
    vivace.restore(pipe)
    assert packed(pipe) == 0
    torch.testing.assert_close(encoded(pipe)[0], stock, rtol=1e-5, atol=1e-5)
