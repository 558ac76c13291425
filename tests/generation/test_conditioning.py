"""LoRAs, IP-Adapters, ControlNets and videos, through `generate` on random models."""

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DModel,
)
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from PIL import Image
from safetensors.torch import save_file
from transformers import SiglipVisionConfig, SiglipVisionModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from vivace.errors import InputError
from vivace.families import FAMILIES
from vivace.families.tiny import clip_vision
from vivace.generation.conditioning import Pictures, picture_arguments
from vivace.generation.generate import generate
from vivace.generation.job import Job, Lora
from vivace.load import Source, pipeline_class


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A random SD and SVD folder, a control model, a picture."""
    room = tmp_path_factory.mktemp("room")
    pipe = FAMILIES["sd"].tiny("StableDiffusionControlNetPipeline")
    pipe.controlnet.save_pretrained(room / "controlnet")
    pipe = FAMILIES["sd"].tiny()
    pipe.register_modules(image_encoder=None)  # as in the published model
    pipe.save_pretrained(room / "sd")
    FAMILIES["svd"].tiny().save_pretrained(room / "svd")
    Image.new("RGB", (64, 64), "red").save(room / "in.png")
    Image.radial_gradient("L").convert("RGB").save(room / "control.png")
    return room


@pytest.fixture
def make(room, tmp_path):
    """Runs a job on the SD folder; gives the picture's bytes and the result."""

    def run(**fields):
        job = {
            "model": str(room / "sd"),
            "prompts": ("a red circle",),
            "steps": 2,
            "seed": 1,
            "size": (64, 64),
        } | fields
        result = generate(Job(output=tmp_path / "out.png", overwrite=True, device="cpu", **job))
        return Image.open(tmp_path / "out.png").tobytes(), result

    return run


def lora(path, *, rank=2):
    """A LoRA of the first attention's output, as PEFT names it."""
    start = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
    torch.manual_seed(0)
    save_file({f"{start}.lora_A.weight": torch.randn(rank, 16), f"{start}.lora_B.weight": torch.randn(16, rank)}, path)
    return path


def test_a_lora_acts_by_its_weight(make, tmp_path):
    path = lora(tmp_path / "style.safetensors")
    plain, _ = make()
    full, result = make(loras=(Lora(path=path),))
    none, _ = make(loras=(Lora(path=path, weight=0.0),))
    assert none == plain != full
    assert result.applied["lora"] == [f"{path}:1"]


def test_a_control_image_steers_by_its_scale(make, room):
    plain, _ = make()
    control = {"controlnet": str(room / "controlnet"), "control_image": room / "control.png"}
    steered, result = make(**control)
    unsteered, _ = make(**control, controlnet_scale=0.0)
    assert unsteered == plain != steered
    assert result.applied["pipeline"] == "StableDiffusionControlNetPipeline"


def test_a_folder_brings_its_own_control_model(make, room, tmp_path):
    FAMILIES["sd"].tiny("StableDiffusionControlNetPipeline").save_pretrained(tmp_path / "own")
    own = {"model": str(tmp_path / "own"), "control_image": room / "control.png"}
    steered, result = make(**own)
    assert result.applied["pipeline"] == "StableDiffusionControlNetPipeline"
    assert make(**own, controlnet_scale=0.0)[0] != steered
    with pytest.raises(InputError, match="needs --control-image too"):
        make(model=own["model"])


def test_an_adapter_takes_its_picture_by_squares(make, room, tmp_path):
    FAMILIES["sdxl"].tiny("StableDiffusionXLAdapterPipeline").save_pretrained(tmp_path / "own")
    own = {"model": str(tmp_path / "own"), "control_image": room / "control.png"}
    with pytest.raises(InputError, match=r"--size 72x64 cannot be made .* multiples of 16; the nearest is 64x64"):
        make(**own, size=(72, 64))
    assert make(**own)[1].size == (64, 64)
    Image.new("RGB", (72, 56), "red").save(tmp_path / "odd.png")
    assert make(**own | {"control_image": tmp_path / "odd.png"}, size=None)[1].size == (64, 64)
    apart = {"model": str(tmp_path / "sdxl"), "controlnet": str(tmp_path / "own" / "adapter")}
    FAMILIES["sdxl"].tiny().save_pretrained(apart["model"])
    assert make(**apart, control_image=tmp_path / "odd.png", size=None)[1].size == (64, 64)


def test_several_pictures_make_one(make, room, tmp_path):
    FAMILIES["flux2"].tiny().save_pretrained(tmp_path / "flux2")
    model, both = str(tmp_path / "flux2"), (room / "in.png", room / "control.png")
    pictures = [make(model=model, images=images)[0] for images in (both, both[:1], both[::-1])]
    assert len(set(pictures)) == 3
    with pytest.raises(InputError, match="takes one --image; 2 were given"):
        make(images=both)


@pytest.mark.parametrize(
    ("family", "pipeline", "masked"),
    [
        ("flux", "FluxKontextPipeline", False),
        ("flux", "FluxKontextInpaintPipeline", True),
        ("sd", "StableDiffusionInstructPix2PixPipeline", False),
    ],
)
def test_an_edit_has_the_size_that_is_asked(make, room, tmp_path, family, pipeline, masked):
    FAMILIES[family].tiny(pipeline).save_pretrained(tmp_path / "edit")
    pictures = {"images": (room / "in.png",), "mask": room / "control.png" if masked else None}
    _, result = make(model=str(tmp_path / "edit"), **pictures, size=(48, 80))
    assert (result.applied["pipeline"], result.size) == (pipeline, (48, 80))


def test_a_class_that_goes_by_its_picture_takes_no_size():
    source = Source(name="edit", path=None, pipeline="QwenImageEditInpaintPipeline", family=FAMILIES["qwen_image"])
    pictures = Pictures(images=(Image.new("RGB", (64, 64)),), mask=Image.new("L", (64, 64)))
    asked = {"pipeline": pipeline_class(source), "source": source}
    assert picture_arguments(pictures, job=Job(), **asked).keys() >= {"image", "mask_image"}
    with pytest.raises(InputError, match="goes by the shape of its --image"):
        picture_arguments(pictures, job=Job(size=(64, 64)), **asked)


def test_a_model_of_no_family_that_takes_no_prompt(make, tmp_path):
    sizes = {"block_out_channels": (32,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = UNet2DModel(sample_size=16, layers_per_block=1, **sizes)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    bare = {"model": str(tmp_path / "ddpm"), "size": None}
    with pytest.raises(InputError, match="DDPMPipeline does not take PROMPT"):
        make(**bare)
    assert make(**bare, prompts=())[1].size == (16, 16)


def test_a_model_of_no_family_that_asks_for_more(make, tmp_path):
    sizes = {"num_attention_heads": 1, "attention_head_dim": 8, "num_layers": 1, "sample_size": 4, "out_channels": 8}
    parts = {"transformer": DiTTransformer2DModel(**sizes), "vae": AutoencoderKL(), "scheduler": DDIMScheduler()}
    DiTPipeline(**parts).save_pretrained(tmp_path / "dit")
    bare = {"model": str(tmp_path / "dit"), "size": None, "prompts": ()}
    with pytest.raises(InputError, match="DiTPipeline needs class_labels; give it by --call-kwargs"):
        make(**bare)
    assert make(**bare, call_kwargs={"class_labels": [3]})[1].applied["class_labels"] == [3]


def test_more_steps_than_timesteps(make):
    with pytest.raises(InputError, match=r"--steps is 1001; .* knows 1000 timesteps"):
        make(steps=1001, scheduler="dpmsolver-multistep")


def test_a_seed_is_a_picture_also_where_a_pipeline_draws_without_it(make, room, tmp_path):
    FAMILIES["sd3"].tiny("StableDiffusion3ControlNetPipeline").save_pretrained(tmp_path / "own")
    own = {"model": str(tmp_path / "own"), "control_image": room / "control.png"}
    before = torch.random.get_rng_state()
    first, _ = make(**own)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(5)
    assert make(**own)[0] == first
    assert make(**own, seed=2)[0] != first


def test_a_control_model_that_is_none(make, room):
    with pytest.raises(InputError, match="is not a ControlNet's folder"):
        make(controlnet=str(room / "svd"), control_image=room / "control.png")
    with pytest.raises(InputError, match="cannot take --control-image with a AutoencoderKL"):
        make(controlnet=str(room / "sd" / "vae"), control_image=room / "control.png")


def test_a_control_model_for_many_kinds_is_told_which(make, room, tmp_path):
    pipe = FAMILIES["sdxl"].tiny("StableDiffusionXLControlNetUnionPipeline")
    pipe.controlnet.save_pretrained(tmp_path / "union")
    FAMILIES["sdxl"].tiny().save_pretrained(tmp_path / "sdxl")
    union = {"controlnet": str(tmp_path / "union"), "control_image": room / "control.png"}
    with pytest.raises(InputError, match="needs the kind of its --control-image, by number; give it as --call-kwargs"):
        make(model=str(tmp_path / "sdxl"), **union)
    edges, result = make(model=str(tmp_path / "sdxl"), **union, call_kwargs={"control_mode": [3]})
    depth, _ = make(model=str(tmp_path / "sdxl"), **union, call_kwargs={"control_mode": [1]})
    assert edges != depth
    assert result.applied["pipeline"] == "StableDiffusionXLControlNetUnionPipeline"
    with pytest.raises(InputError, match="must be lower than 6"):
        make(model=str(tmp_path / "sdxl"), **union, call_kwargs={"control_mode": [99]})


def test_an_ip_adapter_sees_the_last_image(make, room, tmp_path):
    unet = StableDiffusionPipeline.from_pretrained(room / "sd").unet
    torch.manual_seed(0)
    weights = {"image_proj.proj.weight": torch.randn(4 * 32, 32), "image_proj.proj.bias": torch.zeros(4 * 32)}
    weights |= {"image_proj.norm.weight": torch.ones(32), "image_proj.norm.bias": torch.zeros(32)}
    crossing = [name for name in unet.attn_processors if "attn2" in name]
    for index, name in enumerate(crossing):
        width = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        weights |= {f"ip_adapter.{2 * index + 1}.to_{kind}_ip.weight": torch.randn(width, 32) for kind in "kv"}
    path = tmp_path / "ip.safetensors"
    save_file(weights, path)
    with pytest.raises(InputError, match="needs its image encoder"):
        make(ip_adapter=path, images=(room / "in.png",))
    clip_vision().save_pretrained(tmp_path / "image_encoder")
    plain, _ = make()
    red, result = make(ip_adapter=path, images=(room / "in.png",))
    grey, _ = make(ip_adapter=path, images=(room / "control.png",))
    assert len({plain, red, grey}) == 3
    assert result.applied["pipeline"] == "StableDiffusionPipeline"


def test_a_video_from_a_picture_without_a_prompt(room, tmp_path):
    pytest.importorskip("av")
    from vivace.generation import video

    job = {"model": str(room / "svd"), "images": (room / "in.png",), "steps": 1, "seed": 1, "frames": 3, "fps": 5}
    result = generate(Job(output=tmp_path / "out.mp4", device="cpu", size=(64, 64), **job))
    assert (result.frames, result.size) == (3, (64, 64))
    made = video.facts(tmp_path / "out.mp4")
    assert (made["frames"], made["seed"], made["prompt"]) == (3, 1, "")
    with pytest.raises(InputError, match="does not take PROMPT"):
        generate(Job(model=str(room / "svd"), output=tmp_path / "b.mp4", prompts=("a frog",)))


@torch.no_grad()
def test_an_ip_adapter_of_stable_diffusion_3(make, room, tmp_path):
    pipe = FAMILIES["sd3"].tiny()
    pipe.save_pretrained(tmp_path / "sd3")
    torch.manual_seed(0)
    width, sizes = pipe.transformer.inner_dim, {"embed_dim": 16, "hidden_dim": 64, "heads": 1, "num_queries": 2}
    image = IPAdapterTimeImageProjection(**sizes, output_dim=width, timestep_in_dim=32)
    weights = {f"image_proj.{name}": value for name, value in image.state_dict().items()}
    inner = {"hidden_size": width, "ip_hidden_states_dim": width, "head_dim": 16, "timesteps_emb_dim": 64}
    for index in range(len(pipe.transformer.attn_processors)):
        processor = SD3IPAdapterJointAttnProcessor2_0(**inner)
        weights |= {f"ip_adapter.{index}.{name}": value for name, value in processor.state_dict().items()}
    save_file({name: torch.randn_like(value) for name, value in weights.items()}, tmp_path / "ip.safetensors")
    config = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    SiglipVisionModel(config).save_pretrained(tmp_path / "image_encoder")
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "image_encoder")
    own = {"model": str(tmp_path / "sd3")}
    plain, _ = make(**own)
    red, _ = make(**own, ip_adapter=tmp_path / "ip.safetensors", images=(room / "in.png",))
    grey, _ = make(**own, ip_adapter=tmp_path / "ip.safetensors", images=(room / "control.png",))
    assert len({plain, red, grey}) == 3
