"""The processor without its video half: the stock class's text and pictures, and it survives saving."""

from PIL import Image
from transformers import Qwen2_5_VLProcessor

from vivace.families.still_processor import StillQwenVLProcessor
from vivace.families.tokenizers import qwen_vl_processor


def test_is_the_stock_class_and_survives_saving(tmp_path):
    processor = qwen_vl_processor()
    assert isinstance(processor, Qwen2_5_VLProcessor)
    processor.save_pretrained(tmp_path)
    again = StillQwenVLProcessor.from_pretrained(tmp_path)
    given = {"text": ["<|image_pad|> a frog"], "images": [Image.linear_gradient("L").convert("RGB")]}
    assert again(**given)["input_ids"] == processor(**given)["input_ids"]
    assert again.image_processor.size == processor.image_processor.size
