"""Small real tokenizers and processors for random-weight pipelines, written here from the words of a few sentences.

Each function returns the transformers class the published pipeline uses, with that model's special tokens and chat
roles, so prompts pass through the same code as in the full-size pipeline. Nothing is read from disk or downloaded.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import (
        CLIPTokenizer,
        PreTrainedTokenizerFast,
        Qwen2_5_VLProcessor,
        Qwen2Tokenizer,
        T5Tokenizer,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

# Their words become single tokens, so that ordinary prompts stay short; other words fall into pieces.
SENTENCES = (
    "a small red circle above a large blue square on a plain yellow background",
    "a frog holding a sign, a cat sitting on the left of a dog, a photograph of a mountain lake at sunset",
    "describe the image by its color, shape, size, texture, quantity, text and the spatial relationships of objects",
    "change the input image as the instruction says, keep the features and the background the same, generate a new one",
    "the system assistant answers the user, reasons about the description of an object, its structure and attributes",
    "an astronaut riding a green horse through a forest, high quality, detailed, cinematic, soft light",
    "blurry, low quality, distorted, bright tones, worst details, static, overexposed, still picture, ugly, deformed",
)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")

INSTRUCT = (
    "<s>{% for message in messages %}"
    "{% set mark = {'system': 'SYSTEM_PROMPT', 'user': 'INST'}.get(message.role) %}{% if mark %}[{{ mark }}]{% endif %}"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}[IMG]{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "{% if mark %}[/{{ mark }}]{% else %}</s>{% endif %}{% endfor %}"
)
INSTRUCT_TOKENS = ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]", "[IMG_BREAK]", "[IMG_END]")


@cache
def _byte_pairs(space: str = "", suffix: str = "") -> tuple[dict[str, int], Any]:
    """Byte-level BPE vocabulary and merges: every word of `SENTENCES` grows from its letters, left to right.

    `space` is the byte that opens a word, `suffix` the mark that closes one; a model has one of the two.
    Merges are a list of pairs, which the annotations of transformers do not foresee.
    """
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: dict[tuple[str, str], None] = {}
    for word in re.findall(r"\w+", " ".join(SENTENCES)):
        left, *rest = [*space, *word[:-1], word[-1] + suffix]
        for right in rest:
            merges[left, right] = None
            left += right
    names = [*letters, *(letter + suffix for letter in letters), *map("".join, merges)]
    return {name: index for index, name in enumerate(dict.fromkeys(names))}, list(merges)


def clip_tokenizer(*, max_length: int = 77) -> CLIPTokenizer:
    """A CLIP tokenizer; `<|endoftext|>` has the highest id, by which CLIP finds its pooled token. Pads with it too."""
    from transformers import CLIPTokenizer

    pieces, merges = _byte_pairs(suffix="</w>")
    vocab = {name: index for index, name in enumerate((*pieces, "<|startoftext|>", "<|endoftext|>"))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def t5_tokenizer(*, max_length: int = 512) -> T5Tokenizer:
    """A T5 tokenizer (UMT5 uses the same class) over whole words, with single characters below them."""
    from transformers import T5Tokenizer

    words = Counter(re.findall(r"\w+", " ".join(SENTENCES)))
    total = sum(words.values())
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    whole = [(f"▁{word}", math.log(count / total)) for word, count in words.items() if len(word) > 1]
    letters = [(letter, -15.0) for letter in ("▁", *map(chr, range(33, 127)))]
    return T5Tokenizer(vocab=[*special, *whole, *letters], extra_ids=0, model_max_length=max_length)


def qwen2_tokenizer(*, max_length: int = 8192) -> Qwen2Tokenizer:
    """A Qwen2 tokenizer with the chat and vision tokens and template of Qwen 2.5, Qwen 2.5-VL and Qwen 3."""
    from transformers import Qwen2Tokenizer

    pieces, merges = _byte_pairs(space="Ġ")
    return Qwen2Tokenizer(
        vocab={**pieces, "<|endoftext|>": len(pieces)},
        merges=merges,
        additional_special_tokens=list(CHATML_TOKENS),
        chat_template=CHATML,
        padding_side="right",
        model_max_length=max_length,
    )


def mistral_tokenizer(*, max_length: int = 8192) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with Mistral's instruction tokens and template; it pads on the left, as theirs does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces, merges = _byte_pairs(space="Ġ")
    vocab = {name: index for index, name in enumerate(("<unk>", "<s>", "</s>", "<pad>", *pieces))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=list(INSTRUCT_TOKENS),
        chat_template=INSTRUCT,
        padding_side="left",
        model_max_length=max_length,
    )


def clip_image_processor(*, size: int = 32) -> CLIPImageProcessorPil:
    """The image processor of a CLIP vision encoder that sees `size` x `size` pixels (the one built on Pillow)."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    side: dict[str, Any] = {"height": size, "width": size}
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=side)


def qwen_vl_processor(*, patch_size: int = 14, most_patches: int = 16) -> Qwen2_5_VLProcessor:
    """The text-and-image processor of Qwen 2.5-VL; pictures become at most `most_patches` patches of `patch_size`."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from vivace.families.still_processor import StillQwenVLProcessor

    pixels = patch_size**2
    images = Qwen2VLImageProcessorPil(
        patch_size=patch_size, size={"shortest_edge": 4 * pixels, "longest_edge": most_patches * pixels}
    )
    return StillQwenVLProcessor(images, qwen2_tokenizer())
