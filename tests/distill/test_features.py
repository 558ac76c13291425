"""Features: the very activations of the teacher's block, and nothing computed beyond it."""

import pytest
import torch

from vivace.distill.features import Features, spread
from vivace.errors import InputError
from vivace.families import FAMILIES

BLOCKS = {"sd": "mid_block", "sdxl": "mid_block", "pixart": "transformer_blocks.0", "sd3": "transformer_blocks.0",
          "flux": "transformer_blocks.1"}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
def test_features_are_the_blocks_own_output(name):
    family = FAMILIES[name]
    denoiser = getattr(family.tiny(), family.denoisers[0])
    inputs = family.inputs(denoiser, size=(64, 64), batch=2, text_tokens=7)
    features = Features(family.split(denoiser))
    assert features.block == BLOCKS[name]
    outputs = []
    hook = denoiser.get_submodule(BLOCKS[name]).register_forward_hook(lambda _, __, output: outputs.append(output))
    with torch.no_grad():
        denoiser(**inputs)
        hook.remove()
        found = features(sides=(8, 8), **inputs)
    output = outputs[0]
    # joint blocks return text and picture
    output = output[1] if isinstance(output, tuple) and len(output) == 2 else output
    output = output[0] if isinstance(output, tuple) else output
    assert torch.allclose(found, spread(output, sides=(8, 8)), atol=1e-5)


def test_what_comes_after_is_not_run():
    unet = FAMILIES["sd"].tiny().unet
    hook = unet.up_blocks[0].register_forward_pre_hook(lambda *_: pytest.fail("ran on"))
    Features(FAMILIES["sd"].split(unet))(sides=(8, 8), **FAMILIES["sd"].inputs(unet, size=(64, 64), text_tokens=7))
    hook.remove()


def test_recomputing_changes_no_gradient():
    denoiser = FAMILIES["sd3"].tiny().transformer.requires_grad_(False)
    inputs = FAMILIES["sd3"].inputs(denoiser, size=(64, 64), batch=1, text_tokens=7)
    found = []
    for recompute in (False, True):
        x = inputs["hidden_states"].clone().requires_grad_()
        features = Features(FAMILIES["sd3"].split(denoiser), block="transformer_blocks.1", recompute=recompute)
        features(sides=(8, 8), **{**inputs, "hidden_states": x}).square().mean().backward()
        found.append(x.grad)
    assert torch.allclose(found[0], found[1], atol=1e-7)


def test_tokens_become_a_map_of_the_pictures_shape():
    tokens = torch.arange(8.0).view(1, 8, 1)  # 2 rows of 4
    assert spread(tokens, sides=(4, 8))[0, 0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert spread(tokens, sides=(16, 32)).shape == (1, 1, 2, 4)


def test_a_block_that_is_not_there():
    with pytest.raises(InputError, match=r"no block \'mid_block\'; it has transformer_blocks\.0, "):
        Features(FAMILIES["sd3"].split(FAMILIES["sd3"].tiny().transformer), block="mid_block")
