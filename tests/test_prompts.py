"""The same prompt is encoded once, anything that could make another embedding is noticed, and memory stays bounded."""

import inspect

import pytest
import torch
from diffusers import DDIMScheduler

import vivace
from vivace.families import FAMILIES


@pytest.fixture
def pipe():
    pipe = FAMILIES["sdxl"].tiny()
    pipe.set_progress_bar_config(disable=True)
    vivace.accelerate(pipe)
    yield pipe
    vivace.restore(pipe)


def counts(pipe):
    return vivace.report(pipe).prompts


def encoded(pipe, prompt="a fox", **options):
    needed = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    needed |= {"prompt_2": prompt, "prompt_3": prompt}
    parameters = inspect.signature(pipe.encode_prompt).parameters
    needed = {n: v for n, v in needed.items() if n in parameters and parameters[n].default is inspect.Parameter.empty}
    with torch.no_grad():
        return pipe.encode_prompt(prompt, **{**needed, **options})


def same(a, b):
    return all(torch.equal(one, two) for one, two in zip(a, b, strict=True) if one is not None)


def test_the_second_time_is_remembered_and_the_same(pipe):
    first = encoded(pipe, negative_prompt="blurred")
    again = encoded(pipe, negative_prompt="blurred")
    assert same(first, again)
    again[0].zero_()  # what a pipeline does with its own does not reach the next
    assert same(first, encoded(pipe, negative_prompt="blurred"))
    assert counts(pipe)["hits"] == 2
    assert counts(pipe)["computed"] == 1
    assert counts(pipe)["bytes"] == sum(part.nbytes for part in first if part is not None)
    assert "2 of 3 found again" in str(vivace.report(pipe))


@pytest.mark.parametrize(
    "other",
    [
        {"prompt": "a hen"},
        {"prompt": ["a fox", "a fox"]},
        {"negative_prompt": "blurred"},
        {"clip_skip": 1},
        {"num_images_per_prompt": 2},
        {"do_classifier_free_guidance": False},
        {"prompt_2": "a hen"},
    ],
)
def test_every_argument_matters(pipe, other):
    encoded(pipe)
    ours = encoded(pipe, **other)
    assert counts(pipe)["hits"] == 0
    vivace.restore(pipe)
    assert same(ours, encoded(pipe, **other))


def test_a_whole_request(pipe):
    def picture(prompt):
        generator = torch.Generator().manual_seed(0)
        return pipe(prompt, num_inference_steps=2, height=64, width=64, generator=generator, output_type="pt").images

    first = picture("a fox")
    assert torch.equal(picture("a fox"), first)
    assert not torch.equal(picture("a hen"), first)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    picture("a fox")
    assert (counts(pipe)["hits"], counts(pipe)["computed"]) == (2, 2)


def test_written_weights(pipe):
    encoded(pipe)
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight.mul_(1.5)
    ours = encoded(pipe)
    pipe.text_encoder.to(torch.bfloat16)
    encoded(pipe)
    pipe.text_encoder.to(torch.float32)
    assert counts(pipe) | {"bytes": 0} == {"hits": 0, "computed": 3, "passed": 0, "bytes": 0}
    assert not same(ours, encoded(FAMILIES["sdxl"].tiny()))


def test_adapters_and_their_strength(pipe):
    from peft import LoraConfig

    plain = encoded(pipe)
    pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted = encoded(pipe)
    assert not same(plain, adapted)
    halved = encoded(pipe, lora_scale=0.5)
    assert not same(halved, adapted)
    assert pipe._lora_scale == 0.5
    pipe._lora_scale = None
    assert same(encoded(pipe, lora_scale=0.5), halved)
    assert pipe._lora_scale == 0.5
    pipe.text_encoder.disable_adapters()
    assert same(encoded(pipe), plain)
    assert counts(pipe)["hits"] == 1


def test_words_added_to_a_tokenizer(pipe):
    encoded(pipe, "a fox <new>")
    pipe.tokenizer.add_tokens(["<new>"])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    encoded(pipe, "a fox <new>")
    assert counts(pipe)["hits"] == 0


def test_embeddings_gradients_and_other_encoders_pass_by(pipe):
    embeds = encoded(pipe)
    encoded(pipe, None, prompt_embeds=embeds[0], pooled_prompt_embeds=embeds[2])
    pipe.encode_prompt("a fox")[0].sum().backward()
    pipe.text_encoder = FAMILIES["sdxl"].tiny().text_encoder
    encoded(pipe)
    assert counts(pipe)["passed"] == 3
    assert counts(pipe)["hits"] == 0


def test_a_budget_of_bytes():
    pipe = FAMILIES["sdxl"].tiny()
    size = sum(part.nbytes for part in encoded(pipe))
    vivace.accelerate(pipe, prompts_mib=2.5 * size / 2**20)
    for prompt in ("a", "b", "a", "c", "a", "b"):  # c puts b out
        encoded(pipe, prompt)
    assert (counts(pipe)["hits"], counts(pipe)["computed"]) == (2, 4)
    assert counts(pipe)["bytes"] == 2 * size
    vivace.accelerate(pipe, prompts_mib=0.5 * size / 2**20)
    encoded(pipe, "a")
    assert counts(pipe)["bytes"] == 0
    vivace.restore(pipe)


@pytest.mark.parametrize("family", ["sd", "sd3", "flux", "flux2", "qwen_image", "wan", "pixart", "z_image"])
def test_every_family(family):
    pipe = FAMILIES[family].tiny()
    stock = encoded(pipe)
    vivace.accelerate(pipe)
    encoded(pipe)
    again = encoded(pipe)
    assert (counts(pipe)["hits"], counts(pipe)["computed"]) == (1, 1)
    from torch.utils._pytree import tree_leaves

    pairs = zip(tree_leaves(again), tree_leaves(stock), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs if isinstance(a, torch.Tensor))
    vivace.restore(pipe)


def test_off(unet_pipe):
    vivace.accelerate(unet_pipe, prompts="off")
    assert counts(unet_pipe) == {}
    vivace.restore(unet_pipe)
