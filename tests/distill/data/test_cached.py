"""Items on disk: what comes back is what was written, and training on them is training."""

import dataclasses

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save

from vivace.distill import Data, Records, train
from vivace.distill.actors import Actors
from vivace.distill.data.cached import Cached, made_of, read_item, write_item
from vivace.distill.precache import write_cache
from vivace.errors import InputError
from vivace.families import FAMILIES


def flat(value, name=""):
    """Every leaf of nested values, by path."""
    if isinstance(value, dict):
        return {key: leaf for part, one in value.items() for key, leaf in flat(one, f"{name}.{part}").items()}
    if isinstance(value, list | tuple):
        return {key: leaf for part, one in enumerate(value) for key, leaf in flat(one, f"{name}.{part}").items()}
    return {name: value}


def test_an_item_comes_back(actors, batch, tmp_path):
    item = actors.prepare(batch)
    write_item(item, tmp_path / "item")
    found = read_item(tmp_path / "item")
    before, after = (flat({"z": one.z, **vars(one.call)}) for one in (item, found))
    assert before.keys() == after.keys()
    for name, value in before.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, after[name]), name
            assert value.dtype == after[name].dtype
        else:
            assert value == after[name], name


def test_what_is_no_item_is_refused(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match="not a batch that `vivace distill --precache` wrote"):
        read_item(tmp_path / "x.safetensors")
    (tmp_path / "y.safetensors").write_bytes(save({"z": torch.zeros(1)}, metadata={"call": "[]"}))
    with pytest.raises(InputError, match="not a batch that `vivace distill --precache` wrote"):
        read_item(tmp_path / "y.safetensors")
    with pytest.raises(InputError, match="holds no batch for process 0"):
        Cached(str(tmp_path / "none"), batch=2, seed=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is not there")
def test_a_device_that_has_no_room_is_not_the_files_fault(actors_of, batch, tmp_path):
    write_item(actors_of("sd3").prepare(batch), tmp_path / "item")
    with pytest.raises((AssertionError, RuntimeError)):
        read_item(tmp_path / "item", device="cuda:0")
    assert read_item(tmp_path / "item", device="cpu:0").z.device.type == "cpu"


def test_a_training_on_a_cache(config, tmp_path):
    own = config(tmp_path / "run", records=Records(trackers=(), sample_every=0))
    told = []
    count = write_cache(own, tmp_path / "cache", batches=3, pipe=FAMILIES["sd3"].tiny(), on_batch=told.append)
    assert (count, told) == (3, [1, 2, 3])
    cached = dataclasses.replace(own, data=Data(kind="cached", path=str(tmp_path / "cache")))
    result = train(cached, pipe=FAMILIES["sd3"].tiny())
    assert result.done == 10
    assert result.losses["distillation"] > 0
    with pytest.raises(InputError, match="holds batches of 2, and batch is 3; set batch: 2"):
        train(dataclasses.replace(cached, batch=3, output=str(tmp_path / "other")), pipe=FAMILIES["sd3"].tiny())


def test_a_cache_of_another_config_is_refused_with_what_differs(config, tmp_path):
    write_cache(config(), tmp_path / "cache", batches=1, pipe=FAMILIES["sd3"].tiny())
    data = Data(kind="cached", path=str(tmp_path / "cache"))
    for fields, said in (
        ({"size": (128, 128)}, r"size: \[64, 64\] -> \[128, 128\]; put it back, or write it again elsewhere"),
        ({"teacher": "models/sdxl"}, "teacher: builtin -> sdxl"),
        ({"negative": "blurry"}, "negative: None -> blurry"),
        ({"precision": "bfloat16"}, "precision: float32 -> bfloat16"),
    ):
        with pytest.raises(InputError, match=f"00000000.safetensors was written with another config: {said}"):
            train(config(tmp_path / "run", data=data, **fields), pipe=FAMILIES["sd3"].tiny())
    with pytest.raises(InputError, match="was written with another config: negative: None -> blurry"):
        write_cache(config(negative="blurry"), tmp_path / "cache", batches=2, pipe=FAMILIES["sd3"].tiny())
    # A folder that was moved is the same teacher.
    elsewhere = made_of(config(teacher="/here/sdxl"))
    assert elsewhere == made_of(config(teacher="/there/sdxl"))


def test_a_cache_that_was_begun_goes_on_and_computes_nothing_again(config, tmp_path, monkeypatch):
    write_cache(config(), tmp_path / "whole", batches=3, pipe=FAMILIES["sd3"].tiny())
    write_cache(config(), tmp_path / "begun", batches=2, pipe=FAMILIES["sd3"].tiny())
    prepare, prepared = Actors.prepare, []
    monkeypatch.setattr(
        Actors, "prepare", lambda self, batch, **kw: prepared.append(batch.captions) or prepare(self, batch, **kw)
    )
    assert write_cache(config(), tmp_path / "begun", batches=3, pipe=FAMILIES["sd3"].tiny()) == 3
    assert len([captions for captions in prepared if captions != ("",)]) == 1  # beside the grey picture that is tried
    for name in (f"{number:08d}.safetensors" for number in range(3)):
        begun, whole = (load_file(tmp_path / folder / name) for folder in ("begun", "whole"))
        assert begun.keys() == whole.keys()
        assert all(torch.equal(begun[key], whole[key]) for key in whole)


def test_buckets_come_out_of_a_cache(config, tmp_path):
    """The discriminator is as deep as the smallest of them allows, which is not `size`."""
    for index in range(4):
        Image.new("RGB", (256, 64), "red").save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text("red")
    folder = Data(kind="folder", path=str(tmp_path), ratios=(1.0, 4.0))
    own = config(tmp_path / "run", data=folder, size=(256, 256))
    write_cache(own, tmp_path / "cache", batches=2, pipe=FAMILIES["sdxl"].tiny())
    cached = dataclasses.replace(folder, kind="cached", path=str(tmp_path / "cache"))
    assert train(dataclasses.replace(own, data=cached), pipe=FAMILIES["sdxl"].tiny()).losses["discriminator"] > 0
    squares = dataclasses.replace(cached, ratios=())
    with pytest.raises(InputError, match=r"data\.ratios: \[1\.0, 4\.0\] -> \[\]; put it back"):
        train(dataclasses.replace(own, data=squares, output="other"), pipe=FAMILIES["sdxl"].tiny())


def test_what_cannot_be_written_is_said_and_the_rest_stays(config, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file cannot be made a folder"):
        write_cache(config(), tmp_path / "file", batches=1, pipe=FAMILIES["sd3"].tiny())
    (tmp_path / "cache" / "00000001.part" / "x").mkdir(parents=True)
    with pytest.raises(InputError, match=r"00000001\.safetensors cannot be written .*; make room and start again"):
        write_cache(config(), tmp_path / "cache", batches=2, pipe=FAMILIES["sd3"].tiny())
    assert len(read_item(tmp_path / "cache" / "00000000.safetensors").z) == 2


def test_epochs_have_every_file_once_and_resume(config, actors_of, batch, tmp_path):
    item = actors_of("sd3").prepare(batch)
    for number in range(4):
        write_item(dataclasses.replace(item, z=item.z * 0 + number), tmp_path / f"{number}.safetensors")
    cached = Cached(str(tmp_path), batch=2, seed=3)
    drawn = [int(next(cached).z.flatten()[0]) for _ in range(8)]
    assert sorted(drawn[:4]) == sorted(drawn[4:]) == [0, 1, 2, 3]
    again = Cached(str(tmp_path), batch=2, seed=3)
    again.load({"epoch": 0, "position": 3})
    assert [int(next(again).z.flatten()[0]) for _ in range(5)] == drawn[3:]
