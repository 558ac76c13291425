"""Weights placed by a budget: the pictures stay, everything goes back, and what cannot be is refused first."""

import copy
import importlib
import inspect

import pytest
import torch
from PIL import Image

import vivace
from vivace import InputError
from vivace.accelerate import acceleration_of
from vivace.families import FAMILIES
from vivace.memory.footprint import work
from vivace.memory.placement import LEVELS
from vivace.passes.vram import parts_of


@pytest.fixture
def on_cpu(monkeypatch):
    """Lets the CPU stand for the GPU whose memory is planned."""
    module = importlib.import_module("vivace.accelerate")
    monkeypatch.setattr(module, "device_for", lambda config: torch.device("cpu") if config.vram else None)


def picture(pipe):
    pipe.set_progress_bar_config(disable=True)
    options = {"num_frames": 5} if "num_frames" in inspect.signature(pipe.__call__).parameters else {}
    generator = torch.Generator().manual_seed(1)
    result = pipe("a fox", num_inference_steps=3, height=64, width=64, generator=generator, output_type="pt", **options)
    return torch.as_tensor(result.frames if options else result.images)


def weights(pipe):
    return {
        f"{name}.{key}": tensor.clone()
        for name, part in pipe.components.items()
        if isinstance(part, torch.nn.Module)
        for key, tensor in part.state_dict().items()
    }


FEW = [("sd3", level) for level in LEVELS] + [(name, "streamed") for name in ("flux", "qwen_image", "wan", "sdxl")]
ALL = [(name, level) for name in ("flux", "sd3", "qwen_image", "wan", "sdxl") for level in LEVELS]
CASES = [pytest.param(*case, marks=[] if case in FEW else pytest.mark.full) for case in ALL]


@pytest.mark.parametrize(("family", "level"), CASES)
def test_the_same_picture_at_every_level(family, level, on_cpu):
    pipe = FAMILIES[family].tiny()
    stock, before = picture(pipe), weights(pipe)
    vivace.accelerate(pipe, vram=level)
    torch.testing.assert_close(picture(pipe), stock, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(picture(pipe), stock, rtol=1e-3, atol=1e-3)
    note = next(note for note in vivace.report(pipe).passes if note.name == "vram")
    assert note.done
    assert "peak" in note.detail
    vivace.restore(pipe)
    assert torch.equal(picture(pipe), stock)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(pipe).items())


@pytest.mark.parametrize("mode", ["merged", "side", "off"])
@pytest.mark.parametrize("family", ["sd3", "wan"])
def test_lora_on_placed_weights(family, mode, on_cpu, lora_of):
    pipe = FAMILIES[family].tiny()
    stock = copy.deepcopy(pipe)
    plain = picture(stock)
    factors = lora_of(pipe.transformer, std=0.3)
    vivace.accelerate(pipe, vram="streamed", lora=mode)
    for one in (pipe, stock):
        one.load_lora_weights(dict(factors), adapter_name="a")
        if family == "wan":
            one.load_lora_weights(dict(factors), adapter_name="b", load_into_transformer_2=True)
    wanted = picture(stock)
    assert not torch.allclose(wanted, plain, atol=1e-3)
    for _ in range(2):
        torch.testing.assert_close(picture(pipe), wanted, rtol=1e-3, atol=2e-3)
    for one in (pipe, stock):
        one.unload_lora_weights()
    torch.testing.assert_close(picture(pipe), plain, rtol=1e-3, atol=1e-3)
    vivace.restore(pipe)
    assert all(torch.equal(tensor, weights(stock)[name]) for name, tensor in weights(pipe).items())


def test_a_budget_chooses_and_a_smaller_one_says_what_it_needs(on_cpu):
    pipe = FAMILIES["sd3"].tiny()
    vivace.accelerate(pipe, vram="24GB")
    assert "resident" in str(vivace.report(pipe))
    with pytest.raises(InputError, match="give at least vram="):
        vivace.accelerate(pipe, vram="1.1GB")
    assert vivace.report(pipe).config["vram"] == "24GB"


@pytest.mark.parametrize("family", ["flux", "qwen_image"])
def test_a_plan_counts_the_step_cache(family, on_cpu):
    pipe = FAMILIES[family].tiny()
    plans = {}
    for cache in (None, "taylorseer", "pab"):
        vivace.accelerate(pipe, vram="64GB", cache=cache, graphs="off")
        plans[cache] = acceleration_of(pipe).target.placement
    assert plans[None].kept == 0
    assert plans["taylorseer"].kept > 0
    assert plans["pab"].kept > 0
    for plan in plans.values():
        assert plan.peak - plan.kept == plans[None].peak
    note = next(note for note in vivace.report(pipe).passes if note.name == "cache")
    assert f"at most {-(-plans['pab'].kept // 2**20)} MiB" in note.detail
    with pytest.raises(InputError, match="of it for its step cache"):
        vivace.accelerate(pipe, vram="1.1GB", cache="pab")


def test_a_plan_counts_the_graphs(on_cpu):
    pipe = FAMILIES["sd3"].tiny()
    plans = {}
    for fields in ({"graphs": "off"}, {"graphs": "auto"}, {"graphs": "auto", "check_nan": True}):
        vivace.accelerate(pipe, vram="64GB", **fields)
        plans[str(fields)] = acceleration_of(pipe).target.placement
    off, auto, checked = plans.values()
    assert off.recorded == checked.recorded == 0
    assert auto.recorded == auto.place_of("transformer").part.work > 0


def test_two_calls_of_guidance_remember_apart(on_cpu):
    family = FAMILIES["qwen_image"]
    pipe = family.tiny()
    vivace.accelerate(pipe, vram="64GB", cache="taylorseer")
    arguments = family.inputs(pipe.transformer, **family.usual(pipe.transformer))
    output = 4 * arguments["hidden_states"].numel()
    assert acceleration_of(pipe).target.placement.kept == 2 * 3 * output


def test_what_is_refused(monkeypatch, on_cpu):
    pipe = FAMILIES["sd3"].tiny()
    for text in ("lots", "12"):
        with pytest.raises(InputError, match="a size like 24GB"):
            vivace.accelerate(pipe, vram=text)
    monkeypatch.setattr("vivace.passes.vram.available", lambda: 0)
    monkeypatch.setattr("vivace.passes.vram._on_host", lambda target: 0)
    with pytest.raises(InputError, match="of host memory are needed"):
        vivace.accelerate(pipe, vram="streamed")
    pipe.text_encoder._hf_hook = object()
    with pytest.raises(InputError, match="carries offload hooks already"):
        vivace.accelerate(pipe, vram="resident")
    del pipe.text_encoder._hf_hook
    assert vivace.report(pipe).preset is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu():
    with pytest.raises(InputError, match="memory of a GPU"):
        vivace.accelerate(FAMILIES["sd3"].tiny(), vram="24GB")


def test_what_moves_is_fused_but_not_compiled(on_cpu):
    pipe = FAMILIES["sd3"].tiny()
    vivace.accelerate(pipe, vram="streamed")
    notes = {note.name: note for note in vivace.report(pipe).passes}
    assert notes["fuse"].done
    assert notes["compile"].detail == "its blocks are streamed"
    with pytest.raises(InputError, match="blocks are streamed"):
        vivace.accelerate(pipe, vram="streamed", compile="on")
    with pytest.raises(InputError, match="placed by vram="):
        pipe.transformer.to(torch.float64)
    vivace.accelerate(pipe, vram="encoders")
    assert next(note for note in vivace.report(pipe).passes if note.name == "fuse").done


def test_experts_that_take_turns_are_neither_fused_nor_recorded(on_cpu):
    pipe = FAMILIES["wan"].tiny()
    vivace.accelerate(pipe, vram="streamed")
    notes = {note.name: note for note in vivace.report(pipe).passes}
    assert notes["fuse"].detail == notes["compile"].detail == "the denoisers take turns on the device"
    for fields in ({"fuse": "on"}, {"compile": "on"}):
        with pytest.raises(InputError, match="take turns on the device"):
            vivace.accelerate(pipe, vram="streamed", **fields)


@pytest.mark.gpu
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("family", ["flux", "sd3", "qwen_image", "wan", "sdxl"])
def test_the_same_picture_on_a_gpu(family, level):
    pipe = FAMILIES[family].tiny()
    stock = picture(copy.deepcopy(pipe).to("cuda")).cpu()
    vivace.accelerate(pipe, vram=level)
    for _ in range(2):
        torch.testing.assert_close(picture(pipe).cpu(), stock, rtol=1e-2, atol=1e-2)
    vivace.restore(pipe)
    assert all(tensor.device.type == "cpu" for tensor in weights(pipe).values())


def test_a_plan_counts_the_weights_as_they_will_be(on_cpu):
    """int8 linears take half of bfloat16's bytes: the plan says so before anything is quantised."""

    held = {}
    for quant in ("off", "int8_weights"):
        pipe = FAMILIES["flux"].tiny().to(torch.bfloat16)
        vivace.accelerate(pipe, vram="resident", quant=quant)
        target = acceleration_of(pipe).target
        held[quant] = target.placement.place_of("transformer").part.nbytes
        # What was planned is what is there.
        now = next(part for part in parts_of(target) if part.name == "transformer")
        assert held[quant] == now.nbytes
    assert 0.5 < held["int8_weights"] / held["off"] < 0.9


def test_a_plan_leaves_no_shapes_behind(on_cpu):
    """Z-Image keeps a table of positions from one call to the next: not that of the call on shapes alone."""
    family = FAMILIES["z_image"]
    denoiser = family.tiny().transformer
    given = family.inputs(denoiser, size=(64, 64), batch=1, frames=1, text_tokens=8, seed=1)
    with torch.no_grad():
        wanted = copy.deepcopy(denoiser)(**given)[0][0]
        vivace.accelerate(denoiser, vram="resident", fuse="off")
        torch.testing.assert_close(denoiser(**given)[0][0], wanted, rtol=1e-4, atol=1e-4)


def test_a_video_that_is_a_batch_is_counted_with_all_of_its_frames():
    """Stable Video Diffusion decodes 25 frames at once: 28 GiB at its size, which a budget of 24 has no room for."""
    whole, part = (str(vivace.plan("svd", vram=vram, device="cpu", dtype="bfloat16")) for vram in ("48GB", "24GB"))
    assert "resident: peak 4" in whole
    assert "strips: peak 1" in part


def test_a_vae_without_tiles_within_a_budget(on_cpu):
    pipe = FAMILIES["svd"].tiny()

    def video():
        still, generator = Image.linear_gradient("L").resize((64, 64)).convert("RGB"), torch.Generator().manual_seed(0)
        return pipe(
            still,
            64,
            64,
            num_frames=5,
            num_inference_steps=1,
            decode_chunk_size=4,
            generator=generator,
            output_type="pt",
        ).frames

    stock = video()
    vivace.accelerate(pipe, vram="strips")
    torch.testing.assert_close(video(), stock, rtol=1e-3, atol=1e-3)
    vivace.restore(pipe)
    assert torch.equal(video(), stock)


@pytest.mark.parametrize(
    ("pipeline", "more"),
    [
        ("StableDiffusionPipeline", False),
        ("StableDiffusionImg2ImgPipeline", True),
        ("StableDiffusionControlNetPipeline", False),
        ("StableDiffusionControlNetImg2ImgPipeline", True),
    ],
)
def test_pictures_that_the_vae_encodes_count(pipeline, more, on_cpu, monkeypatch):
    """In strips a decode takes less than an encode, which takes the picture whole."""
    monkeypatch.setattr("vivace.memory.strips.LIMIT", 2**16)
    pipe = FAMILIES["sd"].tiny(pipeline)
    vivace.accelerate(pipe, vram="strips")
    (vae,) = (part for part in parts_of(acceleration_of(pipe).target) if part.kind == "vae")
    x = torch.empty(1, 3, 512, 512, device="meta")
    assert (vae.strip_work >= work(pipe.vae, "encode", x=x)) == more
