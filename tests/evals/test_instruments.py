"""Folders of real pictures as instruments, with any feature module."""

import pytest
import torch
from PIL import Image

from vivace import InputError
from vivace.evals.fid import Moments, fid
from vivace.evals.instruments import Dataset


def features(pictures: torch.Tensor) -> torch.Tensor:
    """Mean and spread of each colour: six numbers a picture of any size."""
    return torch.cat([pictures.mean((2, 3)), pictures.std((2, 3))], dim=1)


def write(folder, count: int, *, seed: int, sizes=((20, 24), (16, 16))) -> list[torch.Tensor]:
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        height, width = sizes[index % len(sizes)]
        pixels = (torch.rand(height, width, 3, generator=generator) * 200).to(torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
        made.append(pixels.permute(2, 0, 1)[None].float() / 255)
    return made


def test_a_folder_is_at_no_distance_from_itself(tmp_path):
    pictures = write(tmp_path / "real", 12, seed=0)
    dataset = Dataset.of(tmp_path / "real", features)
    by_name = {row.name: row for row in dataset.measure(pictures, of="candidate: itself")}
    assert by_name["FID"].value == pytest.approx(0, abs=1e-9)
    assert by_name["FID"].count == 12


def test_distances_are_those_of_the_features(tmp_path):
    write(tmp_path / "real", 12, seed=0)
    others = [picture * 0.5 for picture in write(tmp_path / "other", 10, seed=1)]
    real = torch.cat([features(p) for p in write(tmp_path / "real", 12, seed=0)]).double()
    drawn = torch.cat([features(p) for p in others]).double()
    rows = Dataset.of(tmp_path / "real", features).measure(others, of="x")
    # The folder is read in the order of its names, which the distance does not know of.
    assert rows[0].value == pytest.approx(fid(Moments.of(drawn), Moments.of(real)), rel=1e-6)
    assert rows[1].name == "KID"
    assert rows[1].low < rows[1].value < rows[1].high
    assert rows[1].value > 0


def test_too_few_are_refused_before_anything_is_drawn(tmp_path):
    write(tmp_path / "real", 6, seed=0)
    with pytest.raises(InputError, match=r"FID in 6 features needs more than 6 pictures a side, got 6 in .*--kid"):
        Dataset.of(tmp_path / "real", features)
    Dataset.of(tmp_path / "real", features, distances=("KID",))
    write(tmp_path / "real", 9, seed=0)
    with pytest.raises(InputError, match="5 prompts"):
        Dataset.of(tmp_path / "real", features, drawn=5)
    with pytest.raises(InputError, match="got 3 prompts"):
        Dataset.of(tmp_path / "real", features, drawn=3)
    with pytest.raises(InputError, match="is no folder"):
        Dataset.of(tmp_path / "nothing", features)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds 0 pictures"):
        Dataset.of(tmp_path / "empty", features)
