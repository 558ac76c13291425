"""A few-step student put into a pipeline: what fits, what does not, and what it stacks with."""

import json

import pytest
import torch
from safetensors.torch import save_file

import vivace
from vivace.builtin.reader import load_reader
from vivace.errors import InputError
from vivace.evals.builtin import draw_exam, take
from vivace.families import FAMILIES
from vivace.few_step import FACTS, FOLDER, WEIGHTS, facts, fold, source_of, use_few_step
from vivace.load import find, load_source

LAYER = "transformer_blocks.0.attn.to_q"


@pytest.fixture
def student(tmp_path):
    """A result with one layer."""
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / FACTS).write_text(json.dumps({"steps": 4, "guidance": 1.0}))
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 32, generator=generator), torch.randn(32, 2, generator=generator)
    save_file({f"transformer.{LAYER}.lora_A.weight": down, f"transformer.{LAYER}.lora_B.weight": up}, folder / WEIGHTS)
    return folder, up @ down


def test_the_weights_are_added(student):
    folder, added = student
    pipe = FAMILIES["sd3"].tiny()
    before = pipe.transformer.get_submodule(LAYER).weight.detach().clone()
    assert use_few_step(pipe, folder) is pipe
    assert torch.allclose(pipe.transformer.get_submodule(LAYER).weight, before + added, atol=1e-5)
    assert type(pipe.scheduler).__name__ == "FewStepFlow"


def test_it_stacks_with_a_lora_of_another_style(student, tmp_path):
    folder, added = student
    style = {
        f"transformer.{LAYER}.lora_A.weight": torch.ones(1, 32),
        f"transformer.{LAYER}.lora_B.weight": torch.ones(32, 1),
    }
    save_file(style, tmp_path / "style.safetensors")
    pipe = use_few_step(FAMILIES["sd3"].tiny(), folder)
    pipe.load_lora_weights(tmp_path, weight_name="style.safetensors")
    module = pipe.transformer.get_submodule(LAYER)
    x = torch.randn(3, 32)
    stock = FAMILIES["sd3"].tiny().transformer.get_submodule(LAYER)
    with torch.no_grad():
        expected = stock(x) + x @ (added + torch.ones(32, 32)).T
        assert torch.allclose(module(x), expected, atol=1e-3)


def test_a_convolution_is_added_too(tmp_path):
    unet = FAMILIES["sd"].tiny().unet
    before = unet.conv_in.weight.detach().clone()
    down, up = torch.randn(2, 4, 3, 3), torch.randn(16, 2, 1, 1)
    save_file(
        {"lora_unet_conv_in.lora_down.weight": down, "lora_unet_conv_in.lora_up.weight": up}, tmp_path / "x.safetensors"
    )
    fold(unet, tmp_path / "x.safetensors", slot="unet")
    expected = before + torch.einsum("or,rihw->oihw", up[:, :, 0, 0], down)
    assert torch.allclose(unet.conv_in.weight, expected, atol=1e-5)


def test_what_does_not_fit_changes_nothing(student):
    folder, _ = student
    pipe = FAMILIES["flux"].tiny()
    weights = {
        "transformer.proj_out.lora_A.weight": torch.ones(1, 32),
        "transformer.proj_out.lora_B.weight": torch.ones(64, 1),
    }
    missing = {
        "transformer.nowhere.lora_A.weight": torch.ones(1, 32),
        "transformer.nowhere.lora_B.weight": torch.ones(64, 1),
    }
    save_file(weights | missing, folder / WEIGHTS)
    before = pipe.transformer.proj_out.weight.detach().clone()
    with pytest.raises(InputError, match=r"does not fit this FluxTransformer2DModel: it has no transformer\.nowhere"):
        use_few_step(pipe, folder)
    save_file(weights | {"transformer.nowhere.lora_A.weight": torch.ones(1, 32)}, folder / WEIGHTS)
    with pytest.raises(InputError, match=r"it has transformer\.nowhere\.lora_A\.weight without its other half"):
        use_few_step(pipe, folder)
    assert torch.equal(before, pipe.transformer.proj_out.weight)


def test_a_folder_that_holds_none(tmp_path):
    with pytest.raises(InputError, match="holds no few-step student"):
        facts(tmp_path)
    (tmp_path / FACTS).write_text('{"steps": "many"}')
    with pytest.raises(InputError, match="holds no few-step student"):
        facts(tmp_path)
    (tmp_path / FACTS).write_text('{"steps": 4, "guidance": 1}')
    with pytest.raises(InputError, match="holds no whole few-step student"):
        facts(tmp_path)
    (tmp_path / "transformer").mkdir()
    assert facts(tmp_path) == {"steps": 4, "guidance": 1.0}
    with pytest.raises(InputError, match="holds no student of this SD3Transformer2DModel: "):
        use_few_step(FAMILIES["sd3"].tiny(), tmp_path)
    (tmp_path / FACTS).write_text('{"steps": 0, "guidance": 1}')
    with pytest.raises(InputError, match="holds no whole few-step student"):
        facts(tmp_path)


def test_quantised_weights_are_refused(student):
    folder, _ = student
    pipe = vivace.accelerate(FAMILIES["sd3"].tiny(), quant="int8")
    with pytest.raises(InputError, match="cannot be added to quantised weights"):
        use_few_step(pipe, folder)


def test_the_built_in_models_student_draws_what_is_asked_in_four_steps():
    source = source_of(find("builtin"))
    folder = source.path / FOLDER
    assert (folder / WEIGHTS).stat().st_size <= 3_000_000
    pipe = use_few_step(load_source(source), folder)
    pipe.set_progress_bar_config(disable=True)
    answers = take(draw_exam(8, seed=3), pipe, load_reader(), steps=facts(folder)["steps"], guidance_scale=1.0)
    # Nine of ten are right: fewer than five of eight would be chance once in two hundred times.
    assert sum(verdict["right"] for verdict in answers.verdicts) >= 5
