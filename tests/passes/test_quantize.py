"""Quantising a pipeline: what is done to every linear, what is refused, and the way back."""

import copy
import importlib
import json

import pytest
import torch
from torch.utils._pytree import tree_leaves

import vivace
from vivace import InputError
from vivace.config import Quant
from vivace.families import FAMILIES
from vivace.kernels.language import INTERPRETED
from vivace.kernels.quant_rows import quant_rows
from vivace.quant import FORMATS
from vivace.quant.linear import QuantLinear


def called(pipe, family: str, *, batch: int = 1) -> torch.Tensor:
    known = FAMILIES[family]
    denoiser = getattr(pipe, known.denoisers[0])
    arguments = known.inputs(denoiser, size=(64, 64), batch=batch, frames=1, text_tokens=8, seed=0)
    with torch.no_grad():
        outputs = tree_leaves(denoiser(**arguments))
    return torch.cat([leaf.flatten() for leaf in outputs if isinstance(leaf, torch.Tensor)])


def distance(got: torch.Tensor, exact: torch.Tensor) -> float:
    return ((got - exact).norm() / exact.norm()).item()


def test_config_names_every_format():
    assert Quant.__args__ == ("off", "auto", *FORMATS)


# Of a tiny random model's output; Stable Video Diffusion's turns 1 % of noise on its input into 21 %.
FAR = {"svd": 0.4}


MODULATED = {"flux", "flux2", "qwen_image", "sd3", "z_image"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_fp8_and_back(family):
    pipe = FAMILIES[family].tiny()
    stock = called(pipe, family)
    vivace.accelerate(pipe, quant="fp8")
    quantised, layers = called(pipe, family), vivace.report(pipe).layers[FAMILIES[family].denoisers[0]]
    assert 1e-5 < distance(quantised, stock) < FAR.get(family, 0.2)
    held = {name for name, m in getattr(pipe, FAMILIES[family].denoisers[0]).named_modules() if type(m) is QuantLinear}
    assert held == {layer.name for layer in layers if layer.format}
    assert {layer.format for layer in layers if layer.format} == {"fp8"} | (
        {"int8_weights"} if family in MODULATED else set()
    )
    assert all(layer.why for layer in layers if not layer.format)
    vivace.restore(pipe)
    assert torch.equal(called(pipe, family), stock)


@pytest.mark.skipif(not INTERPRETED, reason="without Triton's interpreter")
def test_kernels_run_where_a_test_asks_for_them(request, monkeypatch):
    """And their references elsewhere, which every CPU has."""
    from triton.runtime import interpreter

    monkeypatch.setattr(interpreter, "_patch_lang", lambda fn: pytest.fail(f"{fn} is interpreted"))
    x = torch.randn(3, 64)
    quant_rows(x, quantize="int8")
    request.getfixturevalue("interpreted")
    with pytest.raises(pytest.fail.Exception, match="is interpreted"):
        quant_rows(x, quantize="int8")


def test_flux_holds_half():
    planned = vivace.plan("flux:dev", dtype="bfloat16", quant="fp8", keep_base="no")
    assert -planned.added_bytes > 0.49 * planned.components["transformer"]


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("format", FORMATS)
def test_every_format(sd3_pipe, sd3_latents, format):
    stock = sd3_latents(sd3_pipe)
    before = vivace.report(vivace.accelerate(sd3_pipe)).weight_bytes
    vivace.accelerate(sd3_pipe, quant=format)
    assert 1e-5 < distance(sd3_latents(sd3_pipe), stock) < 0.2
    report = vivace.report(sd3_pipe)
    done = [layer for layer in report.layers["transformer"] if layer.format]
    modulation = [] if format == "int8_weights" else [layer for layer in done if layer.format == "int8_weights"]
    # fp32 originals: 3 of 4 bytes are saved, less what the scales take.
    assert before - report.weight_bytes > 0.6 * 4 * sum(layer.outputs * layer.inputs for layer in done) > 0
    assert f"{format}: {len(done) - len(modulation)} linears" in str(report)
    assert modulation == [] or f"{len(modulation)} that read one row a sample in int8_weights" in str(report)
    assert "transformer_blocks.*.ff.net.2  2 x" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["layers"]["transformer"]
    assert torch.equal(sd3_latents(vivace.restore(sd3_pipe)), stock)


def test_asking_again_keeps_the_layers(sd3_pipe):
    vivace.accelerate(sd3_pipe, quant="fp8", keep_base="no")
    layer = sd3_pipe.transformer.transformer_blocks[0].attn.to_q
    vivace.accelerate(sd3_pipe, quant="fp8", keep_base="no", channels_last="off")
    assert sd3_pipe.transformer.transformer_blocks[0].attn.to_q is layer


def test_without_a_base_there_is_no_way_back(sd3_pipe, sd3_latents):
    vivace.accelerate(sd3_pipe, quant="fp8", keep_base="no")
    quantised = sd3_latents(sd3_pipe)
    for change in (vivace.restore, vivace.accelerate, lambda pipe: vivace.accelerate(pipe, quant="int8")):
        with pytest.raises(InputError, match="keep_base='no'"):
            change(sd3_pipe)
        assert torch.equal(sd3_latents(sd3_pipe), quantised)


def test_a_cast_reaches_the_way_back(sd3_pipe, sd3_latents):
    vivace.accelerate(sd3_pipe, quant="int8")
    sd3_pipe.to(torch.bfloat16)
    assert sd3_latents(sd3_pipe).isfinite().all()
    vivace.restore(sd3_pipe)
    assert {p.dtype for p in sd3_pipe.transformer.parameters()} == {torch.bfloat16}
    assert sd3_latents(sd3_pipe).isfinite().all()


def test_saved_as_a_stock_folder(sd3_pipe, tmp_path):
    names = list(sd3_pipe.transformer.state_dict())
    vivace.accelerate(sd3_pipe, quant="fp8")
    assert sorted(sd3_pipe.transformer.state_dict()) == sorted(names)
    sd3_pipe.transformer.save_pretrained(tmp_path)
    loaded = type(sd3_pipe.transformer).from_pretrained(tmp_path)
    layer = sd3_pipe.transformer.transformer_blocks[0].attn.to_q
    assert torch.equal(loaded.transformer_blocks[0].attn.to_q.weight, layer.dequantised())


def test_base_in_the_file(sd3_pipe, sd3_latents, tmp_path):
    stock = sd3_latents(sd3_pipe)
    sd3_pipe.transformer.save_pretrained(tmp_path)
    sd3_pipe.transformer = type(sd3_pipe.transformer).from_pretrained(tmp_path)
    vivace.accelerate(sd3_pipe, quant="fp8", keep_base="file")
    assert "in the model's file" in str(vivace.report(sd3_pipe))
    assert not any(swap.original.weight.numel() for base in bases(sd3_pipe) for swap in base.swaps)
    assert torch.equal(sd3_latents(vivace.restore(sd3_pipe)), stock)

    vivace.accelerate(sd3_pipe, quant="fp8")
    quantised, path = sd3_latents(sd3_pipe), tmp_path / "diffusion_pytorch_model.safetensors"
    held = path.read_bytes()
    for broken, message in ((held[:-4000], "truncated"), (alter(held), "no longer holds the weight")):
        replace(path, broken)
        with pytest.raises(InputError, match=message) as caught:
            vivace.restore(sd3_pipe)
        assert str(path) in str(caught.value)
        assert torch.equal(sd3_latents(sd3_pipe), quantised)
    replace(path, held)
    assert torch.equal(sd3_latents(vivace.restore(sd3_pipe)), stock)

    sd3_pipe.transformer.transformer_blocks[0].attn.to_q.weight.data[0, 0] += 1
    with pytest.raises(InputError, match="was changed since it was loaded"):
        vivace.accelerate(sd3_pipe, quant="fp8", keep_base="file")
    vivace.accelerate(sd3_pipe, quant="fp8")
    assert "on the host" in str(vivace.report(sd3_pipe))


def bases(pipe):
    return type(pipe).vivace_acceleration.target.bases


def replace(path, data: bytes) -> None:
    # Not in place: the layers that are not quantised are mapped from the old one.
    path.unlink()
    path.write_bytes(data)


def alter(data: bytes) -> bytes:
    """The same file with every weight turned round: the header is as it was."""
    from safetensors.torch import load, save

    return save({name: -tensor for name, tensor in load(data).items()}, metadata={"format": "pt"})


@pytest.mark.parametrize("keep", ["host", "file"])
def test_what_fails_halfway_is_put_back(sd3_pipe, sd3_latents, tmp_path, monkeypatch, keep):
    sd3_pipe.transformer.save_pretrained(tmp_path)
    sd3_pipe.transformer = type(sd3_pipe.transformer).from_pretrained(tmp_path)
    stock, made, of = sd3_latents(sd3_pipe), [], QuantLinear.of

    def scarce(linear, **how):
        if len(made) == 9:
            raise torch.OutOfMemoryError("no memory left")
        made.append(of(linear, **how))
        return made[-1]

    monkeypatch.setattr(QuantLinear, "of", scarce)
    with pytest.raises(torch.OutOfMemoryError):
        vivace.accelerate(sd3_pipe, quant="int8", keep_base=keep)
    assert not any(isinstance(module, QuantLinear) for module in sd3_pipe.transformer.modules())
    assert torch.equal(sd3_latents(sd3_pipe), stock)


@pytest.mark.parametrize("keep", ["host", "no"])
def test_a_weight_that_two_layers_share_stays(sd3_pipe, sd3_latents, keep):
    first, second = (block.attn for block in sd3_pipe.transformer.transformer_blocks[:2])
    second.to_q.weight = first.to_q.weight
    vivace.accelerate(sd3_pipe, quant="int8", keep_base=keep)
    whys = [one.why for one in vivace.report(sd3_pipe).layers["transformer"] if one.name.endswith("attn.to_q")]
    assert whys == ["its weight is another layer's too"] * 2
    assert second.to_q.weight is first.to_q.weight
    assert sd3_latents(sd3_pipe).isfinite().all()


@pytest.fixture(params=[{}, {"vram": "8GB"}], ids=["", "placed"])
def budget(request, monkeypatch):
    """Without a budget of memory and with one, for which the CPU stands for the GPU."""
    module = importlib.import_module("vivace.accelerate")
    monkeypatch.setattr(module, "device_for", lambda config: torch.device("cpu") if config.vram else None)
    return request.param


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(sd3_pipe, value, budget):
    sd3_pipe.transformer.transformer_blocks[1].attn.to_k.weight.data[3, 5] = value
    with pytest.raises(InputError, match=r"transformer\.transformer_blocks\.1\.attn\.to_k\.weight holds NaN or inf"):
        vivace.accelerate(sd3_pipe, quant="int8", **budget)
    assert type(sd3_pipe.transformer.transformer_blocks[0].attn.to_q) is torch.nn.Linear


def test_a_base_in_the_file_needs_a_file(sd3_pipe, sd3_latents, budget):
    stock = sd3_latents(sd3_pipe)
    with pytest.raises(InputError, match="loaded from a folder"):
        vivace.accelerate(sd3_pipe, quant="fp8", keep_base="file", **budget)
    assert torch.equal(sd3_latents(sd3_pipe), stock)


class Q8Linear(torch.nn.Linear):
    """As diffusers' for GGUF: 32 values and their scale are 34 bytes of the weight."""

    __module__ = "diffusers.quantizers.gguf.utils"

    def pack(self):
        values = self.weight.detach().reshape(-1, 32)
        scale = (values.abs().amax(1, keepdim=True) / 127).half()
        raw = torch.cat((scale.view(torch.uint8), (values / scale).round().to(torch.int8).view(torch.uint8)), 1)
        self.weight = torch.nn.Parameter(raw.reshape(self.out_features, -1), requires_grad=False)

    def forward(self, x):
        raw = self.weight.view(-1, 34)
        values = raw[:, 2:].contiguous().view(torch.int8) * raw[:, :2].contiguous().view(torch.float16)
        return torch.nn.functional.linear(x, values.view(self.out_features, -1).to(x.dtype), self.bias)


@pytest.fixture
def foreign_pipe(sd3_pipe):
    """Its blocks' linears are quantised by another library."""
    for module in sd3_pipe.transformer.transformer_blocks.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = Q8Linear
            module.pack()
    return sd3_pipe


def test_quantised_by_another_library(foreign_pipe, sd3_latents):
    stock = sd3_latents(foreign_pipe)
    with pytest.raises(InputError, match=r"norm1\.linear is quantised by GGUF already; load the model in 16 bit"):
        vivace.accelerate(foreign_pipe, quant="fp8")
    vivace.accelerate(foreign_pipe)
    assert torch.equal(sd3_latents(foreign_pipe), stock)


@pytest.mark.parametrize("before", [True, False], ids=["loaded before", "loaded after"])
def test_adapters_on_layers_of_another_library_are_pefts(foreign_pipe, sd3_latents, lora_of, before):
    factors = lora_of(foreign_pipe.transformer)
    stock = copy.deepcopy(foreign_pipe)
    stock.load_lora_weights(dict(factors))
    if before:
        foreign_pipe.load_lora_weights(dict(factors))
    vivace.accelerate(foreign_pipe)
    if not before:
        foreign_pipe.load_lora_weights(dict(factors))
    assert torch.equal(sd3_latents(foreign_pipe), sd3_latents(stock))
    assert "is quantised by GGUF already; PEFT computes it" in str(vivace.report(foreign_pipe))
    with pytest.raises(InputError, match=r"lora='merged' cannot be done here: .* quantised by GGUF"):
        vivace.accelerate(foreign_pipe, lora="merged")


def test_auto_leaves_the_cpu_alone(sd3_pipe):
    report = vivace.report(vivace.accelerate(sd3_pipe, "balanced"))
    assert report.preset == "balanced"
    assert "as loaded on cpu" in str(report)
    assert not report.layers


def test_a_denoiser_of_no_known_family_is_quantised_inside_its_blocks():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm_linear = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)

        def forward(self, x):
            return x + self.norm_linear(self.linear(x))

    class Denoiser(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.entry, self.blocks = torch.nn.Linear(64, 64), torch.nn.ModuleList([Block(), Block()])

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return self.entry(x)

    denoiser = Denoiser().eval()
    vivace.accelerate(denoiser, quant="int8")
    fates = {layer.name: layer.format or layer.why for layer in vivace.report(denoiser).layers["denoiser"]}
    assert fates["blocks.0.linear"] == "int8"
    assert "*norm*" in fates["blocks.1.norm_linear"]
    assert fates["entry"] == "outside the repeated blocks"


def test_adapters(sd3_pipe, sd3_latents):
    from peft import LoraConfig

    lora = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    torch.manual_seed(0)
    sd3_pipe.transformer.add_adapter(lora)
    adapted = sd3_latents(sd3_pipe)
    vivace.accelerate(sd3_pipe, quant="fp8")
    attention = sd3_pipe.transformer.transformer_blocks[0].attn
    assert type(attention.to_q) is QuantLinear  # what it holds was merged before
    assert 1e-5 < distance(sd3_latents(sd3_pipe), adapted) < 0.2
    assert torch.equal(sd3_latents(vivace.restore(sd3_pipe)), adapted)


@pytest.mark.parametrize("mode", ["merged", "side"])
@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize("before", [True, False], ids=["loaded before", "loaded after"])
def test_adapters_on_quantised_layers(sd3_pipe, sd3_latents, lora_of, format, mode, before):
    plain = sd3_latents(sd3_pipe)
    factors = lora_of(sd3_pipe.transformer)
    stock = copy.deepcopy(sd3_pipe)
    stock.load_lora_weights(dict(factors), adapter_name="a")
    adapted = sd3_latents(stock)
    if before:
        sd3_pipe.load_lora_weights(dict(factors), adapter_name="a")
    vivace.accelerate(sd3_pipe, quant=format, lora=mode)
    if not before:
        packed = copy.deepcopy(sd3_pipe.transformer.transformer_blocks[0].attn.to_q.packed)
        assert distance(sd3_latents(sd3_pipe), plain) < 0.2
        sd3_pipe.load_lora_weights(dict(factors), adapter_name="a")
    assert distance(sd3_latents(sd3_pipe), adapted) < 0.3 < distance(plain, adapted)
    sd3_pipe.load_lora_weights(dict(factors), "b")
    sd3_pipe.set_adapters(["a", "b"], [0.5, 0.5])
    assert distance(sd3_latents(sd3_pipe), adapted) < 0.3
    with pytest.raises(InputError, match="nothing can be fused"):
        sd3_pipe.fuse_lora(components=["transformer"])
    sd3_pipe.unload_lora_weights()
    assert distance(sd3_latents(sd3_pipe), plain) < 0.2
    if not before:
        now = sd3_pipe.transformer.transformer_blocks[0].attn.to_q.packed
        assert all(torch.equal(now[name], tensor) for name, tensor in packed.items())
    vivace.restore(sd3_pipe)
    assert torch.equal(sd3_latents(sd3_pipe), plain)


def test_adapters_stay_when_the_rest_is_accelerated_anew(sd3_pipe, sd3_latents, lora_of):
    factors = lora_of(sd3_pipe.transformer)
    vivace.accelerate(sd3_pipe, quant="int8")
    sd3_pipe.load_lora_weights(dict(factors), adapter_name="a")
    wanted = sd3_latents(sd3_pipe)
    vivace.accelerate(sd3_pipe, quant="int8", fuse="off")
    assert distance(sd3_latents(sd3_pipe), wanted) < 0.1
    vivace.accelerate(sd3_pipe, quant="int8", lora="side")
    assert distance(sd3_latents(sd3_pipe), wanted) < 0.3
    stock = copy.deepcopy(vivace.restore(sd3_pipe))
    assert stock.get_active_adapters() == ["a"]
    assert distance(sd3_latents(stock), wanted) < 0.3


def test_merging_needs_the_originals(sd3_pipe):
    with pytest.raises(InputError, match=r"16-bit weights are not kept .*; lora='side' puts adapters beside them"):
        vivace.accelerate(sd3_pipe, quant="int8", keep_base="no", lora="merged")


@pytest.mark.parametrize("format", ["fp8", "int8"])
def test_a_picture_does_not_depend_on_its_neighbours(format):
    pipe = FAMILIES["flux"].tiny()
    denoiser = pipe.transformer
    vivace.accelerate(pipe, quant=format)
    arguments = FAMILIES["flux"].inputs(denoiser, size=(64, 64), batch=2, frames=1, text_tokens=8, seed=0)
    shared = {"img_ids", "txt_ids"}

    def part(samples: slice) -> dict:
        return {
            name: value[samples] if isinstance(value, torch.Tensor) and name not in shared else value
            for name, value in arguments.items()
        }

    with torch.no_grad():
        alone = denoiser(**part(slice(0, 1)))[0]
        loud = part(slice(None))
        loud["hidden_states"] = loud["hidden_states"] * torch.tensor([1.0, 100.0]).view(2, 1, 1)
        together = denoiser(**loud)[0][:1]
    # One scale for both samples would cost 100 times the precision.
    assert distance(together, alone) < 2e-3


def test_a_checkpoint_loaded_into_quantised_layers_is_what_restore_gives_back(sd3_pipe, sd3_latents):
    stock = copy.deepcopy(sd3_pipe)
    vivace.accelerate(sd3_pipe, quant="int8", keep_base="host")
    sd3_pipe.transformer.load_state_dict(sd3_pipe.transformer.state_dict())  # what it shows is no other checkpoint
    vivace.restore(sd3_pipe)
    assert torch.equal(sd3_latents(sd3_pipe), sd3_latents(stock))
    vivace.accelerate(sd3_pipe, quant="int8", keep_base="host")
    other = {name: tensor * 1.5 for name, tensor in stock.transformer.state_dict().items()}
    sd3_pipe.transformer.load_state_dict(other)
    stock.transformer.load_state_dict(other)
    assert distance(sd3_latents(sd3_pipe), sd3_latents(stock)) < 0.2
    copied = copy.deepcopy(sd3_pipe.transformer)
    copied.load_state_dict({name: tensor * 0 for name, tensor in other.items()})  # is none of ours
    vivace.restore(sd3_pipe)
    assert torch.equal(sd3_latents(sd3_pipe), sd3_latents(stock))
