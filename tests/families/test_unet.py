"""The image UNet's Split with every kind of extra condition its forward takes."""

import diffusers
import pytest
import torch

from vivace.families import FAMILIES, sd, sdxl
from vivace.families.unet import inputs, split

SD, SDXL = FAMILIES["sd"], FAMILIES["sdxl"]


def unet_of(config, **extra):
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(**config | extra).eval()


@pytest.fixture
def unet():
    return unet_of(sd.TINY)


def small(unet, size=(64, 64), **extra):
    return inputs(unet, size=size, batch=2, text_tokens=7, seed=0) | extra


def residuals(unet, kwargs):
    """What a ControlNet would add: one tensor a skip, and one for the middle."""
    state = split(unet).prologue(**kwargs)
    blocks = split(unet).blocks
    for block in blocks[: len(unet.down_blocks)]:
        state = block.forward(state)
    return tuple(map(torch.randn_like, state.skips)), torch.randn_like(state.x)


@pytest.mark.parametrize("config", [sd.TINY, sdxl.TINY])
@pytest.mark.parametrize("size", [(64, 64), (72, 40), (8, 24)])
def test_sizes_that_doubling_does_not_hit(config, size, assert_split_is_forward):
    unet = unet_of(config)
    assert_split_is_forward(unet, small(unet, size=size), family=SD)


@pytest.mark.parametrize("timestep", [3, 3.5, torch.tensor(7), torch.tensor([7]), torch.tensor([7, 9])])
def test_every_form_of_time(unet, timestep, assert_split_is_forward):
    assert_split_is_forward(unet, small(unet, timestep=timestep), family=SD)


def test_masks_and_controlnet_residuals(unet, assert_split_is_forward):
    kwargs = small(unet, encoder_attention_mask=torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1] * 7]))
    down, mid = residuals(unet, kwargs)
    control = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    assert_split_is_forward(unet, kwargs | control, family=SD)
    assert not torch.equal(unet(**kwargs)[0], unet(**kwargs, **control)[0])


def test_a_controlnet_reaches_a_unet_without_a_middle(assert_split_is_forward):
    unet = unet_of(sd.TINY, mid_block_type=None)
    kwargs = small(unet)
    down, mid = residuals(unet, kwargs)
    control = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    assert_split_is_forward(unet, kwargs | control, family=SD)


@pytest.mark.parametrize("middle", [False, True])
@pytest.mark.parametrize("argument", ["down_intrablock_additional_residuals", "down_block_additional_residuals"])
def test_adapter_residuals_stay_the_callers(unet, middle, argument, assert_split_is_forward):
    # in a block with attention the residual joins before its downsampler, in one without at its end
    shapes = [(16, 8), (16, 4), (32, 2), (32, 1), *([(32, 1)] if middle else [])]
    given = [torch.randn(2, channels, side, side) for channels, side in shapes]
    kwargs = small(unet) | {argument: given}
    assert_split_is_forward(unet, kwargs, family=SD)
    split(unet)(**kwargs)
    assert len(given) == len(shapes)


def test_ip_adapter_embeddings(assert_split_is_forward):
    pipe = SD.tiny()
    unet = pipe.unet
    unet._load_ip_adapter_weights([ip_adapter_weights(unet)])
    kwargs = small(unet, added_cond_kwargs={"image_embeds": [torch.randn(2, 1, 32)]})
    assert_split_is_forward(unet, kwargs, family=SD)


def ip_adapter_weights(unet):
    """Random weights in the layout of the published IP-Adapters, with 4 tokens a picture."""
    width = unet.config.cross_attention_dim
    image = {"proj.weight": torch.randn(4 * width, 32), "proj.bias": torch.zeros(4 * width)}
    image |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    keys = {}
    for index, (name, _) in enumerate(unet.attn_processors.items()):
        if "attn2" in name:
            inner = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            keys |= {f"{index}.to_k_ip.weight": torch.randn(inner, width)}
            keys |= {f"{index}.to_v_ip.weight": torch.randn(inner, width)}
    return {"image_proj": image, "ip_adapter": keys}


@pytest.mark.parametrize(
    ("config", "extra"),
    [
        ({"num_class_embeds": 5}, {"class_labels": torch.tensor([1, 4])}),
        ({"class_embed_type": "timestep"}, {"class_labels": torch.tensor([1.0, 4.0])}),
        ({"num_class_embeds": 5, "class_embeddings_concat": True}, {"class_labels": torch.tensor([1, 4])}),
        ({"time_cond_proj_dim": 8}, {"timestep_cond": torch.ones(2, 8)}),
        ({"center_input_sample": True, "time_embedding_act_fn": "silu"}, {}),
        ({"addition_embed_type": "text", "addition_embed_type_num_heads": 4}, {}),
        ({"encoder_hid_dim": 32, "encoder_hid_dim_type": "text_proj"}, {}),
    ],
    ids=str,
)
def test_class_labels_and_other_embeddings(config, extra, assert_split_is_forward):
    unet = unet_of(sd.TINY, **config)
    assert_split_is_forward(unet, small(unet, **extra), family=SD)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_lora_strength_in_the_attention_kwargs(unet, scale, assert_split_is_forward):
    from peft import LoraConfig

    targets = ["to_q", "conv_in", "conv_out", "linear_1"]
    unet.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    kwargs = small(unet, cross_attention_kwargs={"scale": scale})
    assert_split_is_forward(unet, kwargs, family=SD)
    assert kwargs["cross_attention_kwargs"] == {"scale": scale}
    plain = small(unet)
    assert torch.equal(unet(**plain)[0], unet(**kwargs)[0]) == (scale == 1.0)


def test_gligen_boxes(assert_split_is_forward):
    unet = unet_of(sd.TINY, attention_type="gated")
    boxes = {"boxes": torch.rand(2, 3, 4), "masks": torch.ones(2, 3), "positive_embeddings": torch.randn(2, 3, 32)}
    kwargs = small(unet, cross_attention_kwargs={"gligen": boxes})
    assert_split_is_forward(unet, kwargs, family=SD)


def test_inputs_refuse_frames(unet):
    with pytest.raises(ValueError, match="frames=3"):
        inputs(unet, frames=3)
