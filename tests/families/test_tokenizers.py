"""The tokenizers: real classes, lossless where the published ones are, the right special tokens, same every time."""

import subprocess
import sys

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPTokenizer, Qwen2Tokenizer, T5Tokenizer

from vivace.families.tokenizers import (
    clip_image_processor,
    clip_tokenizer,
    mistral_tokenizer,
    qwen2_tokenizer,
    qwen_vl_processor,
    t5_tokenizer,
)

PROMPT = "a photo of a frog, holding 3 signs!"
EVERY = [clip_tokenizer, t5_tokenizer, qwen2_tokenizer, mistral_tokenizer]


@pytest.mark.parametrize("make", EVERY)
def test_survives_saving(make, tmp_path):
    tokenizer = make(max_length=50)
    tokenizer.save_pretrained(tmp_path)
    for again in (type(tokenizer).from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert again(PROMPT).input_ids == tokenizer(PROMPT).input_ids
        assert again.model_max_length == 50
        assert again.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("make", EVERY)
def test_cuts_at_its_length_and_tells_prompts_apart(make):
    tokenizer = make(max_length=12)
    ids = tokenizer([PROMPT * 5, "a cat"], truncation=True, padding="max_length", return_tensors="pt").input_ids
    assert ids.shape == (2, 12)
    assert not torch.equal(ids[0], ids[1])
    assert ids.max() < len(tokenizer)


def test_clip_finds_its_pooled_token():
    tokenizer = clip_tokenizer()
    ids = tokenizer("an Owl é", padding="max_length", return_tensors="pt").input_ids[0]
    assert isinstance(tokenizer, CLIPTokenizer)
    assert len(ids) == tokenizer.model_max_length == 77
    assert ids[0] == tokenizer.bos_token_id
    assert ids.argmax() == (ids == tokenizer.eos_token_id).nonzero()[0]
    assert tokenizer.unk_token_id == tokenizer.eos_token_id == len(tokenizer) - 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == "an owl é"


def test_t5_ends_with_its_mark_and_pads_with_zero():
    tokenizer = t5_tokenizer()
    assert isinstance(tokenizer, T5Tokenizer)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    ids = tokenizer(PROMPT).input_ids
    assert ids[-1] == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == PROMPT
    assert 2 in tokenizer("é").input_ids


def test_qwen2_reads_its_chat_marks_as_single_tokens():
    tokenizer = qwen2_tokenizer()
    assert isinstance(tokenizer, Qwen2Tokenizer)
    assert len(tokenizer("<|im_start|><|vision_start|><|image_pad|><|vision_end|><|im_end|>").input_ids) == 5
    chat = [{"role": "user", "content": PROMPT + " é 日"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == f"<|im_start|>user\n{PROMPT} é 日<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    still = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert still == text + "<think>\n\n</think>\n\n"


def test_mistral_pads_on_the_left_around_a_chat_of_parts():
    tokenizer = mistral_tokenizer()
    chat = [
        {"role": "system", "content": [{"type": "text", "text": "be brief"}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]},
    ]
    tokens = tokenizer.apply_chat_template(
        [chat], return_dict=True, return_tensors="pt", padding="max_length", truncation=True, max_length=64
    )
    ids, mask = tokens["input_ids"][0], tokens["attention_mask"][0]
    assert len(ids) == 64
    assert mask[-1] == 1
    assert mask[0] == 0
    assert tokenizer.decode(ids[mask == 1]) == f"<s>[SYSTEM_PROMPT]be brief[/SYSTEM_PROMPT][INST][IMG]{PROMPT}[/INST]"


def test_qwen_vl_makes_as_many_image_tokens_as_the_encoder_gives():
    processor = qwen_vl_processor()
    text = "<|vision_start|><|image_pad|><|vision_end|> edit it"
    both = processor(text=[text], images=[Image.new("RGB", (100, 60))], padding=True, return_tensors="pt")
    patches = both["image_grid_thw"].prod()
    image_token = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert both["pixel_values"].shape == (patches, 3 * 2 * 14 * 14)
    assert (both["input_ids"] == image_token).sum() == patches // 4
    assert patches <= 16


def test_clip_image_processor_makes_square_pictures():
    pixels = clip_image_processor(size=24)(images=Image.new("RGB", (50, 40)), return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 24, 24)


def test_vocabularies_are_the_same_in_another_process():
    program = (
        "from vivace.families.tokenizers import *\n"
        "import hashlib\n"
        "vocab = [sorted(t().get_vocab().items()) for t in (clip_tokenizer, t5_tokenizer, qwen2_tokenizer)]\n"
        "print(hashlib.sha256(repr(vocab).encode()).hexdigest())"
    )
    runs = [subprocess.run([sys.executable, "-c", program], capture_output=True, text=True) for _ in range(2)]
    assert len(runs[0].stdout) == 65
    assert runs[0].stdout == runs[1].stdout
