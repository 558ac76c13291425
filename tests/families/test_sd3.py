"""SD 3's Split with control residuals, skipped layers, adapters and both kinds of block; the tiny pipeline's shape."""

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

from vivace.families import FAMILIES, sd3

SD3 = FAMILIES["sd3"]


def transformer_of(**extra):
    torch.manual_seed(0)
    return SD3Transformer2DModel(**{**sd3.TINY, "num_layers": 5, "dual_attention_layers": (0, 1)} | extra).eval()


@pytest.fixture
def transformer():
    return transformer_of()


def small(transformer, **extra):
    return sd3.inputs(transformer, size=(64, 96), batch=2, text_tokens=7) | extra


@pytest.mark.parametrize("config", [{}, {"qk_norm": None}, {"dual_attention_layers": ()}, {"patch_size": 1}], ids=str)
def test_kinds_of_block_and_patch(config, assert_split_is_forward):
    transformer = transformer_of(**config)
    assert_split_is_forward(transformer, small(transformer), family=SD3)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_control_residuals(transformer, count, assert_split_is_forward):
    control = {"block_controlnet_hidden_states": [torch.randn(2, 24, transformer.inner_dim) for _ in range(count)]}
    kwargs = small(transformer)
    assert_split_is_forward(transformer, kwargs | control, family=SD3)
    assert not torch.equal(transformer(**kwargs)[0], transformer(**kwargs | control)[0])


@pytest.mark.parametrize("skip", [[], [0], [1, 3]], ids=str)
def test_skipped_layers(transformer, skip, assert_split_is_forward):
    kwargs = small(transformer, skip_layers=skip)
    assert_split_is_forward(transformer, kwargs, family=SD3)
    assert torch.equal(transformer(**kwargs)[0], transformer(**small(transformer))[0]) == (not skip)


def test_skip_layer_guidance_in_the_pipeline(seen, assert_split_is_forward):
    _, calls = seen(
        SD3.tiny(),
        skip_guidance_layers=[1],
        skip_layer_guidance_start=0.0,
        skip_layer_guidance_stop=1.0,
        guidance_scale=4.0,
    )
    skipping = [call for call in calls if call[1].get("skip_layers")]
    assert skipping
    assert_split_is_forward(*skipping[0], family=SD3)


def test_ip_adapter_embeddings(transformer, assert_split_is_forward):
    class Projection(torch.nn.Module):
        """Stands where a loaded adapter puts its projection: tokens and a time embedding from a picture."""

        def forward(self, embeddings, timestep):
            return embeddings * 2, timestep[:, None] * embeddings.mean(1)

    from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0

    width = transformer.inner_dim
    for block in transformer.transformer_blocks:
        if not block.use_dual_attention:
            block.attn.set_processor(
                SD3IPAdapterJointAttnProcessor2_0(
                    hidden_size=width, ip_hidden_states_dim=width, head_dim=16, timesteps_emb_dim=width
                )
            )
    transformer.image_proj = Projection()
    attention = {"ip_adapter_image_embeds": torch.randn(2, 3, width)}
    kwargs = small(transformer, joint_attention_kwargs=attention)
    assert_split_is_forward(transformer, kwargs, family=SD3)
    assert not torch.equal(transformer(**kwargs)[0], transformer(**small(transformer))[0])
    assert list(attention) == ["ip_adapter_image_embeds"]


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_lora_strength(transformer, scale, assert_split_is_forward):
    from peft import LoraConfig

    targets = ["to_q", "context_embedder", "norm1.linear", "proj_out", "linear_1"]
    transformer.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    kwargs = small(transformer, joint_attention_kwargs={"scale": scale})
    assert_split_is_forward(transformer, kwargs, family=SD3)
    assert torch.equal(transformer(**small(transformer))[0], transformer(**kwargs)[0]) == (scale == 1.0)


def test_tiny_has_two_clips_no_t5_and_survives_saving(tmp_path, quick):
    pipe = SD3.tiny()
    assert pipe.text_encoder_3 is None
    assert pipe.tokenizer_3 is None
    pipe.save_pretrained(tmp_path)
    again = StableDiffusion3Pipeline.from_pretrained(tmp_path, text_encoder_3=None, tokenizer_3=None)
    again.set_progress_bar_config(disable=True)
    # loaded weights lie otherwise aligned, which moves the last bit
    torch.testing.assert_close(quick(pipe).images, quick(again).images, rtol=0, atol=1e-5)
    assert not torch.equal(quick(pipe).images, quick(pipe, prompt="a large blue square").images)


@pytest.mark.parametrize(
    ("component", "count"),
    [("text_encoder", 123_650_304), ("text_encoder_2", 694_659_840), ("vae", 83_819_683)],
)
def test_counts_of_the_other_components(component, count):
    module = SD3.full(component=component, device="meta")
    assert sum(parameter.numel() for parameter in module.parameters()) == count
