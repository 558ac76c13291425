"""Bytes made on the device are the bytes that stock makes on the host."""

import numpy as np
import pytest
import torch
from diffusers.image_processor import InpaintProcessor, VaeImageProcessor
from diffusers.video_processor import VideoProcessor

from vivace.fused.postprocess import on_device


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_bytes(dtype):
    torch.manual_seed(0)
    images = (torch.randn(2, 3, 40, 24) * 0.7).to(dtype)
    images[0, :, 0] = torch.linspace(-1, 1, 24).to(dtype)
    processor = VaeImageProcessor()
    stock = processor.postprocess(images)
    undo = on_device(processor)
    ours = processor.postprocess(images)
    kept = processor.postprocess(images, output_type="np")
    undo()
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(ours, stock, strict=True))
    assert np.array_equal(kept, processor.postprocess(images, output_type="np"))
    assert type(processor) is VaeImageProcessor


def test_frames_of_a_video():
    torch.manual_seed(0)
    video, processor = torch.randn(2, 3, 4, 16, 8), VideoProcessor()
    stock = processor.postprocess_video(video, output_type="pil")
    undo = on_device(processor)
    ours = processor.postprocess_video(video, output_type="pil")
    undo()
    assert [[f.tobytes() for f in one] for one in ours] == [[f.tobytes() for f in one] for one in stock]


def test_others_are_left():
    assert on_device(InpaintProcessor()) is None
    assert on_device(None) is None
