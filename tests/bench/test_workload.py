"""Workloads: what a name stands for, what is refused, and how many operations they are."""

import functools

import pytest
import torch
from PIL import Image
from torch.utils._pytree import tree_leaves

from vivace import InputError
from vivace.bench.flops import tflop
from vivace.bench.subject import build, call_of, full_pipeline, inputs_of
from vivace.bench.workload import from_dict, workload_of
from vivace.families import FAMILIES

PLACE = {"device": "cpu", "dtype": "float32"}


def test_a_name_takes_the_variants_own_shape_and_flags_replace_it():
    flux = workload_of("flux", **PLACE)
    assert (flux.variant, flux.size, flux.batch, flux.text_tokens) == ("dev", (1024, 1024), 1, 512)
    sd = workload_of("sd:2.1", **PLACE, batch=4, size=None)
    assert (sd.size, sd.batch, sd.steps) == ((768, 768), 4, 50)
    assert from_dict(sd.to_dict()) == sd
    assert "control" not in sd.to_dict()  # results of before there was one are of the same workload
    assert workload_of("wan", **PLACE, tiny=True).frames == 5
    assert "end to end, 2 steps" in workload_of("flux", **PLACE, tiny=True, end_to_end=True).name


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("fluks", {}, "unknown family 'fluks'; vivace knows sd, sdxl"),
        ("flux:big", {}, "flux has no variant 'big'"),
        ("flux", {"size": (1000, 1000)}, "multiples of 16"),
        ("flux", {"tiny": True, "model": "/nowhere"}, "exclude each other"),
        ("flux", {"model": "/nowhere"}, "no model at /nowhere"),
        ("sdxl", {"frames": 5}, "Stable Diffusion XL draws single pictures"),
        ("wan", {"frames": 6}, "multiples of 4 and one; the nearest is 5"),
        ("flux", {"control": True}, "--control is for random weights of a Stable Diffusion UNet"),
    ],
)
def test_refused(name, options, said):
    with pytest.raises(InputError, match=said):
        workload_of(name, **PLACE, **options)


def test_a_model_of_another_family_is_refused(tmp_path):
    FAMILIES["sd3"].tiny().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="is a StableDiffusion3Pipeline \\(sd3\\), not of flux"):
        workload_of("flux", **PLACE, model=str(tmp_path))
    (tmp_path / "vivace.json").write_text('{"steps": 3, "guidance": 2.5, "size": [64, 64]}')
    workload = workload_of("sd3", **PLACE, model=str(tmp_path), text_tokens=8)
    assert (workload.steps, workload.guidance, workload.size) == (3, 2.5, (64, 64))
    assert type(build(workload)).__name__ == "SD3Transformer2DModel"
    assert tflop(workload) == tflop(workload_of("sd3", **PLACE, tiny=True))


@pytest.mark.parametrize(
    ("name", "expected"), [("flux", 74.38), ("sdxl", 13.52), ("sd3:3.5-medium", 22.50), ("sd:1.5", 1.607)]
)
def test_operations_of_published_models(name, expected):
    assert tflop(workload_of(name, device="cuda", dtype="bfloat16")) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_built_called_and_counted(family):
    workload = workload_of(family, **PLACE, tiny=True)
    assert tflop(workload) > 0
    denoiser = build(workload)
    with torch.no_grad():
        output = denoiser(**inputs_of(denoiser, workload))
    assert all(torch.isfinite(tensor).all() for tensor in tree_leaves(output))


@pytest.mark.parametrize(
    ("name", "denoisers"), [("flux", 1), ("sdxl", 1), ("wan:2.1-t2v-1.3b", 1), ("wan:2.2-t2v-a14b", 2), ("sd3", 1)]
)
def test_a_pipeline_at_true_size_holds_nothing_tiny(name, denoisers):
    workload = workload_of(name, device="meta", dtype="bfloat16", end_to_end=True)
    pipe = full_pipeline(workload)
    modules = {slot: part for slot, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    assert sum(slot in workload.facts.denoisers for slot in modules) == denoisers
    assert all(weight.is_meta for module in modules.values() for weight in module.parameters())
    assert modules[workload.facts.denoisers[0]].num_parameters() == workload.published.parameters
    assert {slot for slot in modules if "encoder" in slot} == set(workload.facts.text_encoders)


def test_a_pipeline_of_pictures_at_true_size_can_read_them():
    video = full_pipeline(workload_of("wan:2.1-i2v-14b-480p", device="meta", dtype="bfloat16", end_to_end=True))
    assert type(video).__name__ == "WanImageToVideoPipeline"
    assert video.image_processor.crop_size.height == video.image_encoder.config.image_size == 224
    experts = full_pipeline(workload_of("wan:2.2-i2v-a14b", device="meta", dtype="bfloat16", end_to_end=True))
    assert experts.transformer_2 is not None
    assert 0 < experts.config.boundary_ratio < 1
    edit = full_pipeline(workload_of("qwen_image:edit", device="meta", dtype="bfloat16", end_to_end=True))
    assert type(edit).__name__ == "QwenImageEditPipeline"
    assert edit.text_encoder.config.image_token_id == edit.processor.image_token_id
    shown = edit.processor(text=["<|image_pad|>"], images=Image.new("RGB", (1024, 1024)), return_tensors="pt")
    assert len(shown["pixel_values"]) > 5000  # patches; the tiny one shows 16


PICTURES = {
    "sd:1.5": set(),
    "sd:1.5-inpaint": {"image", "mask_image"},
    "flux:fill": {"image", "mask_image"},
    "flux:canny": {"control_image"},
    "svd": {"image"},
    "wan:2.1-i2v-14b-480p": {"image"},
    "qwen_image:edit": {"image"},
    "flux2": set(),
    "flux2:klein-4b": set(),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_variant_is_called_as_its_own_pipeline_with_its_pictures(name, monkeypatch):
    workload = workload_of(name, **PLACE, tiny=True, end_to_end=True)
    pipe, told = build(workload), {}
    assert type(pipe).__name__ == workload.pipeline
    monkeypatch.setattr(type(pipe), "__call__", _noting(type(pipe).__call__, told))
    with torch.no_grad():
        output = call_of(pipe, workload)()
    assert {key for key, value in told.items() if isinstance(value, Image.Image)} == PICTURES[name]
    assert all(value.size == workload.size for value in told.values() if isinstance(value, Image.Image))
    assert torch.as_tensor(output).shape[-2:] == (64, 64)


def _noting(stock, told):
    @functools.wraps(stock)
    def call(pipe, **kwargs):
        told.update(kwargs)
        return stock(pipe, **kwargs)

    return call


@pytest.mark.parametrize(("name", "calls"), [("qwen_image", 4), ("wan", 4), ("flux", 2), ("flux2:klein-base-4b", 4)])
def test_guidance_in_two_calls_is_timed_as_two(name, calls):
    workload, made = workload_of(name, **PLACE, tiny=True, end_to_end=True), []
    pipe = build(workload)
    for denoiser in filter(None, (getattr(pipe, slot, None) for slot in workload.facts.denoisers)):
        denoiser.register_forward_pre_hook(lambda *given: made.append(1))
    with torch.no_grad():
        call_of(pipe, workload)()
    assert len(made) == calls


@pytest.mark.parametrize("name", ["sd:1.5", "sdxl"])
def test_a_controlnet_hands_over_a_map_for_every_skip(name):
    """As many and as large as a ControlNet made for that UNet gives."""
    from diffusers import ControlNetModel

    workload = workload_of(name, **PLACE, tiny=True, control=True, size=(72, 64))
    unet = build(workload)
    inputs = inputs_of(unet, workload)
    maps, middle = inputs["down_block_additional_residuals"], inputs["mid_block_additional_residual"]
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 16, 16))
    told = {key: value for key, value in inputs.items() if not key.endswith(("residuals", "residual"))}
    down, mid = controlnet(**told, controlnet_cond=torch.zeros(2, 3, 64, 72))
    assert [one.shape for one in maps] == [one.shape for one in down]
    assert middle.shape == mid.shape
    assert "with a ControlNet" in workload.name
    assert from_dict(workload.to_dict()) == workload


def test_a_pipeline_with_a_controlnet_at_true_size():
    workload = workload_of("sd:1.5", device="meta", dtype="bfloat16", end_to_end=True, control=True)
    pipe = full_pipeline(workload)
    assert type(pipe).__name__ == "StableDiffusionControlNetPipeline"
    assert pipe.controlnet.num_parameters() == 361_279_120
    assert all(weight.is_meta and weight.dtype == torch.bfloat16 for weight in pipe.controlnet.parameters())


def test_a_widened_denoiser_sees_the_same_numbers():
    workload = workload_of("flux", device="cpu", dtype="bfloat16", tiny=True)
    denoiser = build(workload)
    narrow = inputs_of(denoiser, workload)
    wide = inputs_of(denoiser.float(), workload)
    assert wide["hidden_states"].dtype == torch.float32
    assert torch.equal(wide["hidden_states"], narrow["hidden_states"].float())
