"""Instruments with trained networks: known answers where the networks can be had, plain words where they cannot."""

import importlib.util

import pytest
import torch
from safetensors.torch import load_file, save_file

from vivace import InputError
from vivace.evals import perceptual
from vivace.evals.fid import Moments, fid
from vivace.evals.kid import kid
from vivace.evals.pairwise import psnr, ssim

torchmetrics = pytest.importorskip("torchmetrics", reason="the extra [eval] is not installed")


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(InputError, match="the CLIP score has no model"):
        perceptual.clip_score(tmp_path)
    if importlib.util.find_spec("torchvision") is None:
        with pytest.raises(InputError, match="needs the package torchvision"):
            perceptual.lpips()
    if importlib.util.find_spec("torch_fidelity") is None:
        with pytest.raises(InputError, match="needs the package torch_fidelity"):
            perceptual.inception()


def test_lpips_of_equal_pictures():
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("LPIPS needs torchvision, which vivace does not install")
    measure = perceptual.lpips()
    x = torch.rand(2, 3, 64, 64)
    assert measure(x, x).tolist() == [0.0, 0.0]
    assert (measure(x, torch.rand(2, 3, 64, 64)) > 0).all()


@pytest.fixture
def clip(tmp_path):
    """A random CLIP and its processor, which lie in `tmp_path` too."""
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor

    from vivace.families import tiny
    from vivace.families.tokenizers import clip_image_processor, clip_tokenizer

    torch.manual_seed(0)
    text, vision = tiny.clip_text_projected().config, tiny.clip_vision().config
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=tiny.WIDTH))
    processor = CLIPProcessor(clip_image_processor(size=32), clip_tokenizer())
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    return model, processor


def test_a_clip_that_lacks_its_picture_half_is_no_clip(clip, tmp_path):
    """Transformers would draw the missing weights at random, and the score would be one of noise."""
    weights = load_file(path := tmp_path / "model.safetensors")
    save_file({name: w for name, w in weights.items() if "vision" not in name}, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"has no vis.* give a whole one with --clip"):
        perceptual.clip_score(tmp_path)


@pytest.mark.parametrize("content", [b"", b"garbage"])
@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_broken_files_of_weights_are_one_line(clip, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match="does not hold the backbone's weights"):
        perceptual._load_backbone(torch.nn.Linear(1, 1), tmp_path / name)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="the CLIP score has no model"):
        perceptual.clip_score(tmp_path)


def test_clip_score_is_100_times_the_cosine(clip, tmp_path):
    """With a random CLIP from a local folder, against the cosine by hand."""
    model, processor = clip
    pictures, captions = torch.rand(3, 3, 32, 32), ["a fox", "a red house", "seven cats"]
    scores = perceptual.clip_score(tmp_path)(pictures, captions)
    pixels = (pictures * 255).round().to(torch.uint8)
    for score, picture, caption in zip(scores, pixels, captions, strict=True):
        given = processor(text=[caption], images=[picture], return_tensors="pt", padding=True)
        with torch.no_grad():
            out = model.eval()(**given)
        cosine = torch.cosine_similarity(out.image_embeds, out.text_embeds).item()
        assert score.item() == pytest.approx(max(0.0, 100 * cosine), abs=1e-3)


@pytest.fixture
def pairs():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4, 3, 48, 48, generator=generator, dtype=torch.float64)
    return x, (x + 0.1 * torch.randn(x.shape, generator=generator)).clamp(0, 1)


def test_psnr_and_ssim_are_torchmetrics(pairs):
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    x, y = pairs
    theirs = [peak_signal_noise_ratio(a[None], b[None], data_range=1.0).item() for a, b in zip(x, y, strict=True)]
    assert psnr(x, y).tolist() == pytest.approx(theirs, rel=1e-6)
    # Theirs pads the borders by reflection, ours takes whole windows only: near, not equal.
    similar = structural_similarity_index_measure(x, y, data_range=1.0, reduction="none")
    assert ssim(x, y).tolist() == pytest.approx(similar.tolist(), abs=0.02)


class Features(torch.nn.Module):
    """Pictures to twelve numbers."""

    num_features = 12

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.project = torch.nn.Linear(3 * 8 * 8, 12)

    @torch.no_grad()
    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.project(torch.nn.functional.adaptive_avg_pool2d(pictures.float(), 8).flatten(1))


def test_fid_and_kid_are_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    features = Features()
    generator = torch.Generator().manual_seed(1)
    real = torch.rand(256, 3, 16, 16, generator=generator)
    fake = torch.rand(256, 3, 16, 16, generator=generator) ** 1.5
    theirs = FrechetInceptionDistance(feature=features, normalize=True)
    distance = KernelInceptionDistance(feature=features, subsets=20, subset_size=64, normalize=True)
    for metric in (theirs, distance):
        metric.update(real, real=True)
        metric.update(fake, real=False)
    ours = fid(Moments.of(features(fake)), Moments.of(features(real)))
    assert ours == pytest.approx(theirs.compute().item(), rel=1e-3)
    # Both draw subsets, others each.
    found = kid(features(fake), features(real), subset_size=64)
    assert found.value == pytest.approx(distance.compute()[0].item(), abs=4 * found.standard_error)
