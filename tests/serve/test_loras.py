"""LoRAs that requests name: each request's own, whatever was asked for before it."""

import gc
import weakref

import pytest
import safetensors.torch
import torch
from safetensors.torch import save_file

from vivace import InputError
from vivace.serve import Spec
from vivace.serve.failures import FieldError, OutOfMemory, Unavailable


@pytest.fixture
def style(pipe, lora_of, tmp_path):
    path = tmp_path / "style.safetensors"
    save_file(lora_of(pipe.transformer), path)
    return path


@pytest.mark.parametrize("preset", ["exact", None])
def test_a_lora_that_does_not_fit(pipe, start, order, tmp_path, preset):
    other = tmp_path / "other.safetensors"
    save_file({"transformer.no.such.lora_A.weight": torch.zeros(4, 8)}, other)
    misfit = tmp_path / "misfit.safetensors"
    name = "transformer.transformer_blocks.0.attn.to_q"
    save_file({f"{name}.lora_A.weight": torch.zeros(4, 999), f"{name}.lora_B.weight": torch.zeros(32, 4)}, misfit)
    broken = tmp_path / "broken.safetensors"
    save_file(
        {f"{name}.lora_A.weight": torch.full((4, 32), torch.nan), f"{name}.lora_B.weight": torch.zeros(32, 4)}, broken
    )
    engine = start(Spec(source=pipe, preset=preset, loras={"other": other, "misfit": misfit, "broken": broken}))
    before = engine.submit(order(deterministic=True)).result(60).pictures[0].tobytes()
    for alias in ("other", "misfit", "broken"):
        with pytest.raises(FieldError, match="does not fit") as error:
            engine.submit(order(lora={alias: 1.0})).result(60)
        assert error.value.field == "lora"
        assert engine.submit(order(deterministic=True)).result(60).pictures[0].tobytes() == before


def test_loras_are_each_requests_own(pipe, start, order, style):
    engine = start(Spec(source=pipe, loras={"style": style}))
    plain = engine.submit(order(deterministic=True)).result(60).pictures[0].tobytes()
    with_style = engine.submit(order(lora={"style": 1.0}, deterministic=True)).result(60)
    assert with_style.effective["lora"] == {"style": 1.0}
    assert with_style.pictures[0].tobytes() != plain
    weights = [{}, {"style": 1.0}, {"style": 0.5}, {}, {"style": 1.0}, {}]
    jobs = [engine.submit(order(lora=lora, deterministic=True)) for lora in weights]
    found = [job.result(60).pictures[0].tobytes() for job in jobs]
    assert found[0] == found[3] == found[5] == plain
    assert found[1] == found[4] == with_style.pictures[0].tobytes()
    assert found[2] not in (plain, found[1])


def test_a_lora_may_go_by_any_alias(pipe, start, order, style):
    """PEFT makes an attribute of an adapter's name."""
    engine = start(Spec(source=pipe, loras=dict.fromkeys(("style", "half", "style-v1.5"), style)))
    found = [
        engine.submit(order(lora={alias: 0.5}, deterministic=True)).result(60)
        for alias in engine.models["tiny"].spec.loras
    ]
    assert len({one.pictures[0].tobytes() for one in found}) == 1
    assert [dict(one.effective["lora"]) for one in found] == [{"style": 0.5}, {"half": 0.5}, {"style-v1.5": 0.5}]
    both = engine.submit(order(lora={"half": 0.25, "style-v1.5": 0.25}, deterministic=True)).result(60)
    assert both.pictures[0].tobytes() != engine.submit(order(deterministic=True)).result(60).pictures[0].tobytes()


def test_a_request_that_fails_leaves_no_lora_to_the_next(pipe, start, order, style):
    """It fails when its LoRA is on the layers already."""
    engine = start(Spec(source=pipe, loras={"style": style}))
    plain, styled = order(deterministic=True), order(deterministic=True, lora={"style": 1.0})
    before, with_style = (engine.submit(one).result(60).pictures[0].tobytes() for one in (plain, styled))
    for lora in ({"style": 1.0}, {}):
        with pytest.raises(FieldError, match="cannot be done here"):
            engine.submit(order(cache="deepcache", lora=lora)).result(60)
        assert engine.submit(plain).result(60).pictures[0].tobytes() == before
    with pytest.raises(FieldError, match="cannot be done here"):
        engine.submit(order(cache="deepcache")).result(60)
    assert engine.submit(styled).result(60).pictures[0].tobytes() == with_style
    engine.close()
    assert pipe.get_list_adapters() == {}


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), OutOfMemory),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), Unavailable),
    ],
)
def test_what_befalls_the_device_is_not_the_loras_fault(pipe, start, order, style, monkeypatch, error, told):
    engine = start(Spec(source=pipe, loras={"style": style}))

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(pipe, "load_lora_weights", fail)
    with pytest.raises(told):
        engine.submit(order(lora={"style": 1.0})).result(60)
    assert engine.lost == (told is Unavailable)


def test_a_lora_whose_file_is_gone_is_the_servers_fault(pipe, start, order, style):
    engine = start(Spec(source=pipe, loras={"style": style}))
    before = engine.submit(order(deterministic=True)).result(60).pictures[0].tobytes()
    raw = style.read_bytes()
    style.write_bytes(raw[:-100])
    with pytest.raises(Unavailable, match="the LoRA style cannot be read"):
        engine.submit(order(lora={"style": 1.0})).result(60)
    style.unlink()
    with pytest.raises(Unavailable, match="the LoRA style cannot be read"):
        engine.submit(order(lora={"style": 1.0})).result(60)
    assert engine.submit(order(deterministic=True)).result(60).pictures[0].tobytes() == before
    style.write_bytes(raw)
    assert engine.submit(order(lora={"style": 1.0}, deterministic=True)).result(60).pictures[0].tobytes() != before


def test_no_lora_stays_in_memory_that_is_not_worn(pipe, start, order, style, monkeypatch):
    engine = start(Spec(source=pipe, loras={"style": style}))
    read: list[weakref.ref[torch.Tensor]] = []

    def load_file(path):
        weights = safetensors.torch.load_file(path)
        read.extend(map(weakref.ref, weights.values()))
        return weights

    monkeypatch.setattr("vivace.lora.files.load_file", load_file)
    engine.submit(order(lora={"style": 1.0})).result(60)
    engine.submit(order()).result(60)
    gc.collect()
    assert read
    assert not any(one() is not None for one in read)


def test_a_pipeline_with_loras_of_its_own_takes_none_from_requests(pipe, start, order, lora_of, style):
    pipe.load_lora_weights(lora_of(pipe.transformer, seed=2), adapter_name="own")
    with pytest.raises(InputError, match=r"has LoRAs of its own \(own\).*fuse them into it"):
        start(Spec(source=pipe, loras={"style": style}))
    engine = start(Spec(source=pipe))
    engine.submit(order()).result(60)
    assert pipe.get_list_adapters() == {"transformer": ["own"]}
