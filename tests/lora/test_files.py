"""LoRA files: the key formats that people publish, and everything that is wrong with others."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from safetensors.torch import save_file

import vivace
from vivace import InputError
from vivace.families import FAMILIES
from vivace.lora import files


@pytest.fixture(scope="module")
def flux_pipe():
    pipe = FAMILIES["flux"].tiny()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def wan_pipe():
    return FAMILIES["wan"].tiny()


@pytest.fixture(params=["stock", "merged", "side"])
def place(request):
    """Where the file is loaded: into a stock pipeline, or an accelerated one."""
    return (lambda pipe: pipe) if request.param == "stock" else lambda pipe: vivace.accelerate(pipe, lora=request.param)


def noise(pipe, family):
    transformer = pipe.transformer
    with torch.no_grad():
        return transformer(**FAMILIES[family].inputs(transformer, size=(64, 64), text_tokens=7))[0]


def expected(pipe, family, deltas):
    """What the denoiser gives with `deltas` (scale, up, down) added to its weights by hand."""
    pipe = copy.deepcopy(pipe)
    for name, (scale, up, down) in deltas.items():
        pipe.transformer.get_submodule(name).weight.data += scale * up @ down
    return noise(pipe, family)


def factors(weight, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(weight.shape[0], rank, generator=generator), torch.randn(
        rank, weight.shape[1], generator=generator
    )


def diffusers_file(transformer):
    up, down = factors(transformer.get_submodule("transformer_blocks.0.attn.to_q").weight, 4, 1)
    name = "transformer_blocks.0.attn.to_q"
    file = {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
    return file, {name: (1.0, up, down)}


def file_with_alpha(transformer):
    """With the alpha that people add."""
    file, deltas = diffusers_file(transformer)
    return {**file, "transformer.transformer_blocks.0.attn.to_q.alpha": torch.tensor(2.0)}, {
        name: (0.5, up, down) for name, (_, up, down) in deltas.items()
    }


def kohya_file(transformer):
    """sd-scripts' FLUX: underscores, one fused qkv, alphas."""
    width = transformer.inner_dim
    up, down = factors(torch.empty(3 * width, width), 4, 2)
    file = {
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": down,
        "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": up,
        "lora_unet_double_blocks_0_img_attn_qkv.alpha": torch.tensor(2.0),
    }
    names = [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"]
    return file, {name: (0.5, part, down) for name, part in zip(names, up.chunk(3), strict=True)}


@pytest.mark.parametrize("make", [diffusers_file, file_with_alpha, kohya_file])
def test_formats_of_flux(flux_pipe, place, tmp_path, make):
    file, deltas = make(flux_pipe.transformer)
    save_file({key: value.contiguous() for key, value in file.items()}, tmp_path / "style.safetensors")
    pipe = place(copy.deepcopy(flux_pipe))
    files.load(pipe, tmp_path / "style.safetensors", adapter_name="style")
    wanted = expected(flux_pipe, "flux", deltas)
    torch.testing.assert_close(noise(pipe, "flux"), wanted, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(wanted, noise(flux_pipe, "flux"), atol=1e-2)


PEFT = {
    "alpha": {"r": 4, "lora_alpha": 6},
    "patterns": {"r": 4, "rank_pattern": {"to_k": 3}, "alpha_pattern": {"to_q": 20}, "lora_bias": True},
    "rank-stabilised": {"r": 4, "lora_alpha": 3, "use_rslora": True},
}


@pytest.mark.parametrize("config", PEFT.values(), ids=[*PEFT])
@pytest.mark.parametrize("whole", [False, True], ids=["file", "folder"])
def test_what_peft_itself_writes(flux_pipe, place, tmp_path, config, whole):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    adapted = copy.deepcopy(flux_pipe)
    config = LoraConfig(target_modules=["to_q", "to_k", "proj_out"], init_lora_weights=False, **config)
    adapted.transformer = get_peft_model(adapted.transformer, config)
    adapted.transformer.save_pretrained(tmp_path)
    wanted = noise(SimpleNamespace(transformer=adapted.transformer.base_model.model), "flux")
    pipe = place(copy.deepcopy(flux_pipe))
    files.load(pipe, tmp_path if whole else tmp_path / "adapter_model.safetensors", adapter_name="style")
    torch.testing.assert_close(noise(pipe, "flux"), wanted, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(wanted, noise(flux_pipe, "flux"), atol=1e-2)


def test_without_its_configuration_an_alpha_is_its_rank(flux_pipe, caplog, tmp_path):
    file, deltas = diffusers_file(flux_pipe.transformer)
    file = {key.replace("transformer.", "base_model.model.", 1): value for key, value in file.items()}
    save_file(file, tmp_path / "adapter_model.safetensors")
    pipe = copy.deepcopy(flux_pipe)
    with caplog.at_level(logging.WARNING, logger="vivace"):
        files.load(pipe, tmp_path)
    assert "without adapter_config.json" in caplog.text
    torch.testing.assert_close(noise(pipe, "flux"), expected(flux_pipe, "flux", deltas), rtol=1e-3, atol=1e-4)
    (tmp_path / "adapter_config.json").write_text("[1")
    with pytest.raises(InputError, match=r"adapter_config\.json cannot be read"):
        files.load(pipe, tmp_path)


def test_factors_of_8_bits(flux_pipe):
    file, deltas = diffusers_file(flux_pipe.transformer)
    file = {key: value.to(torch.float8_e4m3fn) for key, value in file.items()}
    pipe = copy.deepcopy(flux_pipe)
    files.load(pipe, dict(file))
    down, up = (value.float() for value in file.values())
    deltas = dict.fromkeys(deltas, (1.0, up, down))
    torch.testing.assert_close(noise(pipe, "flux"), expected(flux_pipe, "flux", deltas), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("suffix", [("lora_down", "lora_up"), ("lora_A", "lora_B")], ids="-".join)
def test_formats_of_wan(wan_pipe, place, tmp_path, suffix):
    """ComfyUI's names, as the Wan 2.2 Lightning files have them, into either expert."""
    width = wan_pipe.transformer.blocks[0].attn1.to_q.in_features
    up, down = factors(torch.empty(width, width), 4, 3)
    key = "diffusion_model.blocks.0.self_attn.q"
    file = {f"{key}.{suffix[0]}.weight": down, f"{key}.{suffix[1]}.weight": up}
    if suffix[0] == "lora_down":
        file[f"{key}.alpha"] = torch.tensor(2.0)
    save_file(file, tmp_path / "lightning.safetensors")
    pipe = place(copy.deepcopy(wan_pipe))
    pipe.load_lora_weights(tmp_path / "lightning.safetensors", adapter_name="high")
    pipe.load_lora_weights(tmp_path / "lightning.safetensors", adapter_name="low", load_into_transformer_2=True)
    scale = 0.5 if suffix[0] == "lora_down" else 1.0
    wanted = expected(wan_pipe, "wan", {"blocks.0.attn1.to_q": (scale, up, down)})
    torch.testing.assert_close(noise(pipe, "wan"), wanted, rtol=1e-3, atol=1e-4)
    pipe.transformer, pipe.transformer_2 = pipe.transformer_2, pipe.transformer
    swapped = copy.deepcopy(wan_pipe)
    swapped.transformer = swapped.transformer_2
    wanted = expected(swapped, "wan", {"blocks.0.attn1.to_q": (scale, up, down)})
    torch.testing.assert_close(noise(pipe, "wan"), wanted, rtol=1e-3, atol=1e-4)


def wrong_model(file, first):
    return {key: value[:, :-1] if "lora_A" in key else value for key, value in file.items()}


def impossible_rank(file, first):
    return {key: value[:-1] if "lora_A" in key else value for key, value in file.items()}


def not_finite(file, first):
    file[first][0, 0] = float("nan")
    return file


def half(file, first):
    return {key: value for key, value in file.items() if "lora_B" not in key}


def other_half(file, first):
    return {key: value for key, value in file.items() if key != first}


def whole_numbers(file, first):
    return {key: value.to(torch.int8) for key, value in file.items()}


def strangers(file, first):
    return {key.replace("transformer_blocks", "layers"): value for key, value in file.items()}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (wrong_model, "of another model"),
        (impossible_rank, "share no rank"),
        (not_finite, "holds NaN or infinity; fetch"),
        (half, "no lora_B"),
        (other_half, "no lora_A"),
        (whole_numbers, "in int8, no floating point type"),
        (strangers, "none of its layers is there, for example transformer.layers.0"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(sd3_pipe, sd3_latents, lora_of, spoil, message, place):
    pipe = place(sd3_pipe)
    plain = sd3_latents(pipe)
    names = [name for name, _ in pipe.transformer.named_modules()]
    file = lora_of(pipe.transformer)
    with pytest.raises(InputError, match=message):
        files.load(pipe, spoil(file, next(iter(file))))
    assert [name for name, _ in pipe.transformer.named_modules()] == names
    assert torch.equal(sd3_latents(pipe), plain)
    assert "lora_state_dict" not in vars(pipe)


def test_unmatched_keys_are_listed(sd3_pipe, sd3_latents, lora_of, caplog, tmp_path):
    file = lora_of(sd3_pipe.transformer)
    file["transformer.layers.7.lora_A.weight"] = torch.zeros(4, 8)
    file["transformer.layers.7.lora_B.weight"] = torch.zeros(8, 4)
    file["transformer.transformer_blocks.0.attn.to_q.lora_dora_scale"] = torch.zeros(3)
    file["trained_steps"] = torch.zeros(1)  # which diffusers would refuse the whole file for
    save_file(file, tmp_path / "style.safetensors")
    vivace.accelerate(sd3_pipe)
    with caplog.at_level(logging.WARNING, logger="vivace"):
        sd3_pipe.load_lora_weights(tmp_path / "style.safetensors")
    text = caplog.text
    assert "match nothing" in text
    assert "transformer.layers.7.lora_A.weight" in text
    assert "lora_dora_scale" in text
    assert text.count("trained_steps") == 1
    assert sd3_pipe.get_active_adapters()


def test_pickles_are_refused_under_any_name(sd3_pipe, lora_of, tmp_path):
    vivace.accelerate(sd3_pipe)
    for name in ("style.bin", "style.safetensors"):
        torch.save(lora_of(sd3_pipe.transformer), tmp_path / name)
        with pytest.raises(InputError, match="pickle"):
            sd3_pipe.load_lora_weights(tmp_path / name)
        with pytest.raises(InputError, match="pickle"):
            sd3_pipe.load_lora_weights(tmp_path, weight_name=name)
    with pytest.raises(InputError, match="pickle can run any code"):
        sd3_pipe.load_lora_weights("owner/name", weight_name="style.ckpt")
    (tmp_path / "style.safetensors").unlink()
    with pytest.raises(InputError, match="pickles are refused"):
        sd3_pipe.load_lora_weights(tmp_path)


def test_kinds_left_to_peft(sd3_pipe, sd3_latents):
    """DoRA has no low-rank sum: asked for is an error, left to us it goes through PEFT, and the report says so."""
    from peft import LoraConfig

    vivace.accelerate(sd3_pipe)
    sd3_pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], use_dora=True, init_lora_weights=False))
    stock = copy.deepcopy(sd3_pipe)
    torch.testing.assert_close(sd3_latents(sd3_pipe), sd3_latents(stock), rtol=1e-4, atol=1e-4)
    assert any("to_q" in reason for reason in vivace.report(sd3_pipe).calls["transformer"])
    with pytest.raises(InputError, match="lora='merged' cannot be done here"):
        vivace.accelerate(stock, lora="merged")


@pytest.mark.parametrize("accelerated", [False, True])
def test_the_two_spellings_that_diffusers_writes_into_one_file(unet_pipe, accelerated):
    """Its training scripts spell a UNet's attention in one way, and convolutions in PEFT's."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import get_peft_model_state_dict

    def adapted(pipe):
        return {name for name, module in pipe.unet.named_modules() if isinstance(module, BaseTunerLayer)}

    trained, pipe = copy.deepcopy(unet_pipe), copy.deepcopy(unet_pipe)
    trained.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "conv1"], init_lora_weights=False))
    factors = convert_state_dict_to_diffusers(get_peft_model_state_dict(trained.unet))
    file = {f"unet.{name}": tensor for name, tensor in factors.items()}
    assert any(".lora.down." in name for name in file)
    assert any(".lora_A." in name for name in file)
    if accelerated:
        vivace.accelerate(pipe)
    files.load(pipe, file)
    vivace.restore(pipe)
    assert adapted(pipe) == adapted(trained)
