"""LPIPS from a file: names, values, and what is no such file. The weights here are random."""

import pytest
import torch
from safetensors.torch import save_file

from vivace.distill.lpips import LAYERS, Lpips, decoded_distance, load_lpips
from vivace.errors import InputError
from vivace.families import FAMILIES


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A file of the right names and shapes."""
    generator = torch.Generator().manual_seed(0)
    weights, place, before = {}, 0, 3
    for depth, widths in enumerate(LAYERS):
        for width in widths:
            weights[f"features.{place}.weight"] = torch.randn(width, before, 3, 3, generator=generator) / (
                3 * before**0.5
            )
            weights[f"features.{place}.bias"] = torch.zeros(width)
            before, place = width, place + 2
        weights[f"lin{depth}.model.1.weight"] = torch.rand(1, widths[-1], 1, 1, generator=generator)
        place += 1
    path = tmp_path_factory.mktemp("lpips") / "lpips.safetensors"
    save_file(weights, path)
    return path


def test_names_are_torchvisions(file):
    """The last convolution of VGG16 is features.28."""
    loaded = load_lpips(file)
    assert len(loaded.depths) == 5
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_distance(file):
    loaded = load_lpips(file)
    a, b = torch.rand(2, 1, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    assert float(loaded(a, a)) == 0
    assert float(loaded(a, b)) > float(loaded(a, 0.9 * a + 0.1 * b)) > 0


def test_by_hand_at_the_first_depth(file):
    loaded = load_lpips(file)
    a, b = torch.rand(2, 1, 3, 16, 16) * 2 - 1
    for count in loaded.counts[1:]:
        count.weight.data.zero_()
    mean, spread = (
        torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1),
        torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1),
    )
    fa, fb = (loaded.depths[0]((x - mean) / spread) for x in (a, b))
    unit = [f / f.norm(dim=1, keepdim=True).clamp(min=1e-10) for f in (fa, fb)]
    expected = ((unit[0] - unit[1]).square() * loaded.counts[0].weight).sum(1).mean()
    assert float(loaded(a, b)) == pytest.approx(float(expected), rel=1e-4)
    load_lpips(file)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"features.0.weight": torch.zeros(64, 3, 3, 3)}, path)
    with pytest.raises(InputError, match=r"no features\.0\.bias of the right shape"):
        load_lpips(path)


def test_decoded_latents_have_a_gradient(file):
    vae = FAMILIES["sd3"].tiny().vae.requires_grad_(False)
    distance = decoded_distance(vae, file)
    student, teacher = (torch.randn(1, 16, 8, 8) for _ in range(2))
    student.requires_grad_()
    distance(student, teacher).backward()
    assert student.grad is not None
    assert bool(student.grad.any())
    assert float(distance(teacher, teacher)) == 0
    assert isinstance(load_lpips(file), Lpips)
