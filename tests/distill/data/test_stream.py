"""Shards and folders as a stream: filters, broken samples, buckets, and resumption to the sample."""

import dataclasses
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vivace.distill import Conditioner, Data, DistillConfig, Stage
from vivace.distill.data import sizes_of, supply_of
from vivace.distill.data.folder import Folder
from vivace.distill.data.sample import bucket, bucket_sizes
from vivace.distill.data.shards import Shards
from vivace.distill.data.stream import Stream
from vivace.errors import InputError


def picture(shade: int, size: tuple[int, int] = (20, 16), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, shade, shade)).save(buffer, kind)
    return buffer.getvalue()


def write_shard(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, members in samples.items():
            for extension, raw in members.items():
                entry = tarfile.TarInfo(f"{name}.{extension}")
                entry.size = len(raw)
                tar.addfile(entry, io.BytesIO(raw))
    return path


def said(caption: str, **more: object) -> bytes:
    return json.dumps({"caption": caption, **more}).encode()


@pytest.fixture
def shards(tmp_path):
    """Five shards of six samples; a sample's shade is its number, and so is its caption."""
    for shard in range(5):
        numbers = range(6 * shard, 6 * shard + 6)
        samples = {f"{n:04d}": {"png": picture(n), "json": said(str(n), aesthetic_score=n)} for n in numbers}
        write_shard(tmp_path / f"{shard:02d}.tar", samples)
    return tmp_path / "{00..04}.tar"


def stream(pattern, *, batch=4, sizes=((16, 16),), seed=0, rank=0, world=1, **data) -> Stream:
    settings = Data(path=str(pattern), window=2, workers=2, **data)
    source = Shards(str(pattern), cache=Path(str(pattern)).parent / "cache")
    return Stream(source, settings, sizes=list(sizes), batch=batch, seed=seed, rank=rank, world=world)


def captions(found: Stream, batches: int) -> list[str]:
    return [caption for _ in range(batches) for caption in next(found).captions]


def test_an_epoch_has_every_sample_once_and_epochs_differ(shards):
    found = stream(shards, batch=5)
    first, second = captions(found, 6), captions(found, 6)
    assert sorted(first, key=int) == sorted(second, key=int) == [str(n) for n in range(30)]
    assert first != second != sorted(second, key=int)
    # neighbours come from several shards
    assert len({int(caption) // 6 for caption in first[:10]}) > 1


def test_pixels_are_the_pictures(shards):
    batch = next(stream(shards))
    assert batch.pixels.shape == (4, 3, 16, 16)
    shades = [round(float((value + 1) * 127.5)) for value in batch.pixels[:, 0, 0, 0]]
    assert [str(shade) for shade in shades] == list(batch.captions)


@pytest.mark.parametrize("after", [0, 1, 3, 8])
def test_a_resumed_stream_goes_on_exactly(shards, after):
    whole, broken_off = stream(shards, batch=4), stream(shards, batch=4)
    expected = captions(whole, after + 9)[4 * after :]
    captions(broken_off, after)
    state = json.loads(json.dumps(broken_off.state()))
    again = stream(shards, batch=4)
    again.load(state)
    assert captions(again, 9) == expected


def test_processes_share_an_epoch(shards):
    parts = [captions(stream(shards, batch=1, rank=rank, world=2), count) for rank, count in ((0, 18), (1, 12))]
    assert sorted(map(int, parts[0] + parts[1])) == list(range(30))
    # with fewer shards than processes they take turns in each
    one = shards.parent / "00.tar"
    parts = [captions(stream(one, batch=1, rank=rank, world=3), 2) for rank in range(3)]
    assert sorted(int(caption) for part in parts for caption in part) == list(range(6))


def test_filters_leave_out_and_count(shards):
    found = stream(shards, least_score=24.5, batch=1)
    assert sorted(captions(found, 5), key=int) == ["25", "26", "27", "28", "29"]
    next(found)
    assert found.skipped["aesthetic_score below 24.5 or missing"] >= 25
    with pytest.raises(InputError, match=r"no sample is left of 30 in .*a side below 99 pixels: 30"):
        next(stream(shards, least_side=99))


def test_broken_samples_are_skipped_counted_and_named(tmp_path, caplog):
    path = write_shard(
        tmp_path / "a.tar",
        {
            "good": {"jpg": picture(9, kind="JPEG"), "json": said("fine")},
            "cut": {"png": picture(1)[:40], "json": said("half a picture")},
            "mute": {"png": picture(2), "json": b"{}"},
            "odd": {"png": picture(3), "json": b"{nonsense"},
            "blind": {"json": said("no picture")},
            "plain": {"png": picture(4), "txt": b"from a text file"},
        },
    )
    found = stream(path, batch=1)
    assert sorted(captions(found, 2)) == ["fine", "from a text file"]
    next(found)
    assert {reason: count > 0 for reason, count in found.skipped.items()} == {
        "a picture that cannot be read": True,
        "no caption": True,
        "JSON that cannot be read": True,
        "no picture": True,
    }
    assert "mute in" in caplog.text


def test_shards_without_captions_are_refused(tmp_path):
    path = write_shard(tmp_path / "a.tar", {str(n): {"png": picture(n)} for n in range(3)})
    with pytest.raises(InputError, match=r"no sample is left of 3 .*no caption: 3.*data\.captions"):
        next(stream(path))


def test_nothing_is_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    import pickle

    raw = pickle.dumps(Bomb())
    members = {"png": picture(1), "json": said("a"), "pyd": raw, "pickle": raw, "pth": raw}
    assert next(stream(write_shard(tmp_path / "a.tar", {"x": members}), batch=1)).captions == ("a",)
    assert not (tmp_path / "exploded").exists()


def test_buckets_by_aspect_ratio(tmp_path):
    wide = {f"w{n}": {"png": picture(n, (40, 20)), "json": said(f"wide {n}")} for n in range(4)}
    tall = {f"t{n}": {"png": picture(n, (20, 40)), "json": said(f"tall {n}")} for n in range(4)}
    found = stream(write_shard(tmp_path / "a.tar", wide | tall), batch=2, sizes=[(32, 16), (16, 32)])
    batches = [next(found) for _ in range(4)]
    for batch in batches:
        word = "wide" if batch.size == (32, 16) else "tall"
        assert all(caption.startswith(word) for caption in batch.captions)
    assert {batch.size for batch in batches} == {(32, 16), (16, 32)}


def test_bucket_sizes_keep_area_and_multiple():
    sizes = bucket_sizes((1024, 1024), (0.5, 1.0, 1.75), multiple=64)
    assert sizes == [(704, 1472), (1024, 1024), (1344, 768)]
    assert bucket((1000, 600), sizes) == (1344, 768)
    assert bucket((999, 1000), sizes) == (1024, 1024)


def test_without_ratios_pictures_have_the_size_asked():
    config = DistillConfig(output="o", stages=(Stage(batches=1),), data=Data(path="x"), size=(768, 512))
    assert sizes_of(config, multiple=16) == [(768, 512)]
    buckets = dataclasses.replace(config, data=Data(path="x", ratios=(1.5, 1.0)))
    assert sizes_of(buckets, multiple=16) == [(768, 512), (624, 624)]


def test_further_pictures_of_a_sample(tmp_path):
    path = write_shard(
        tmp_path / "a.tar", {"x": {"png": picture(7), "control.png": picture(200), "json": said("with edges")}}
    )
    batch = next(stream(path, batch=1))
    assert torch.allclose(batch.extras["control"], torch.full((1, 3, 16, 16), 200 / 127.5 - 1))


def test_a_sample_without_a_picture_that_is_needed_is_skipped(tmp_path):
    """A conditioner's source that finds no picture in a batch would end the training."""
    whole = {str(n): {"png": picture(n), "control.png": picture(200), "json": said(str(n))} for n in range(3)}
    path = write_shard(tmp_path / "a.tar", {**whole, "x": {"png": picture(7), "json": said("alone")}})
    edges = Conditioner(join="argument", argument="image", source="extra")
    stages = (Stage(batches=1, steps=4),)
    data = Data(path=str(path), workers=1)
    config = DistillConfig(output="o", stages=stages, data=data, conditioners=(edges,), size=(16, 16), batch=1)
    found: Any = supply_of(config, multiple=8)
    assert sorted(captions(found, 3)) == ["0", "1", "2"]
    next(found)
    assert found.skipped == {"no picture control": 1}


def test_pictures_lie_as_their_camera_was_held(tmp_path):
    """A JPEG says in its EXIF which side is up."""
    lying = Image.new("RGB", (16, 32))
    lying.paste((255, 255, 255), (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # its top is on the right
    buffer = io.BytesIO()
    lying.save(buffer, "JPEG", exif=exif)
    path = write_shard(tmp_path / "a.tar", {"x": {"jpg": buffer.getvalue(), "json": said("a")}})
    pixels = next(stream(path, batch=1, sizes=[(32, 16), (16, 32)])).pixels
    assert pixels.shape == (1, 3, 16, 32)
    assert float(pixels[..., :12].max()) < -0.9
    assert float(pixels[..., -12:].min()) > 0.9


def test_a_folder_is_listed_once(tmp_path, monkeypatch):
    for n in range(20):
        (tmp_path / f"{n}.png").write_bytes(picture(n))
        (tmp_path / f"{n}.txt").write_text(str(n))
    data = Data(kind="folder", path=str(tmp_path), workers=1)
    source = Folder(str(tmp_path))
    monkeypatch.setattr(Path, "iterdir", lambda self: pytest.fail("listed for one picture"))
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: pytest.fail("listed again"))
    found = Stream(source, data, sizes=[(16, 16)], batch=1, seed=0)
    assert sorted(map(int, captions(found, 20))) == list(range(20))


def test_a_folder_of_pictures(tmp_path):
    (tmp_path / "deep").mkdir()
    for folder, name in ((tmp_path, "one"), (tmp_path / "deep", "two")):
        (folder / f"{name}.png").write_bytes(picture(5))
        (folder / f"{name}.txt").write_text(f"caption of {name}")
    (tmp_path / "deep" / "two.control.png").write_bytes(picture(6))
    data = Data(kind="folder", path=str(tmp_path), workers=1)
    found = Stream(Folder(str(tmp_path)), data, sizes=[(16, 16)], batch=1, seed=0)
    assert sorted(captions(found, 2)) == ["caption of one", "caption of two"]
    with pytest.raises(InputError, match="no folder"):
        Folder(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no pictures"):
        Folder(str(tmp_path / "empty"))


def test_broken_shards_are_left_out_counted_once_and_named(shards, caplog):
    (shards.parent / "01.tar").write_text("not a tar file")
    cut = shards.parent / "03.tar"
    cut.write_bytes(cut.read_bytes()[: 4 * 1024 + 100])
    found = stream(shards, batch=1)
    seen = captions(found, 60)
    assert not set(seen) & {str(n) for n in range(6, 12)}
    assert "18" in seen
    assert found.skipped["a shard that is no uncompressed tar file"] == 1
    assert found.skipped["a shard that is cut short"] == 1
    assert f"{shards.parent / '01.tar'}: a shard that is no uncompressed tar file" in caplog.text
    again = stream(shards, batch=1)
    again.load(found.state())
    assert captions(again, 30) == captions(found, 30)
    assert again.skipped["a shard that is no uncompressed tar file"] == 1


def test_a_sample_that_is_gone_at_resumption_is_skipped(tmp_path):
    for n in range(4):
        (tmp_path / f"{n}.png").write_bytes(picture(n))
        (tmp_path / f"{n}.txt").write_text(str(n))

    def folder():
        data = Data(kind="folder", path=str(tmp_path), workers=1)
        return Stream(Folder(str(tmp_path)), data, sizes=[(16, 16), (32, 8)], batch=2, seed=0)

    first = captions(folder(), 1)[0]
    (tmp_path / f"{first}.png").write_bytes(picture(0, (64, 16)))  # alone in its bucket
    found = folder()
    captions(found, 1)
    state = found.state()
    assert [name for _, name in state["pending"]] == [first]
    (tmp_path / f"{first}.txt").unlink()
    again = folder()
    again.load(state)
    assert again.pending == {}
    assert again.skipped == {"no caption": 1}


def test_json_of_any_depth_is_no_end(tmp_path):
    deep = b"[" * 100_000 + b"]" * 100_000
    write_shard(tmp_path / "a.tar", {"a": {"png": picture(1), "json": deep}, "b": {"png": picture(2), "txt": b"b"}})
    found = stream(tmp_path / "a.tar", batch=1)
    assert captions(found, 2) == ["b", "b"]
    assert found.skipped["JSON that cannot be read"] >= 1
