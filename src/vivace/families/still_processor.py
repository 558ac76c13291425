"""Qwen 2.5-VL's processor for still pictures: the stock one insists on a video half, which needs torchvision."""

from __future__ import annotations

from typing import Any

from transformers import Qwen2_5_VLProcessor


class StillQwenVLProcessor(Qwen2_5_VLProcessor):
    """`Qwen2_5_VLProcessor` without a video processor; text and pictures pass through the stock code."""

    # transformers reads the names of the parts off this signature
    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        super().__init__(image_processor, tokenizer, None, chat_template=chat_template)
