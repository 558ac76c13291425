"""A quantised folder is read as it was written, at its small size, or not at all."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import vivace
from vivace import InputError
from vivace.families import FAMILIES
from vivace.quant import FORMATS, folder
from vivace.quant.linear import QuantLinear

FAMILY = FAMILIES["flux"]


def output(transformer) -> torch.Tensor:
    arguments = FAMILY.inputs(transformer, size=(64, 64), batch=1, frames=1, text_tokens=8, seed=0)
    with torch.no_grad():
        return transformer(**arguments)[0]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A tiny FLUX, quantised and written; its folder and what its denoiser gives."""
    where = tmp_path_factory.mktemp("written")
    pipe = FAMILY.tiny().to(torch.bfloat16)
    vivace.accelerate(pipe, quant="fp8", keep_base="no", fuse="off")
    folder.write(pipe, where / "model", denoisers={"transformer": pipe.transformer})
    return where / "model", output(pipe.transformer)


@pytest.fixture
def copied(written, tmp_path):
    """The room of the denoiser, for a test to spoil."""
    import shutil

    shutil.copytree(written[0], tmp_path / "model")
    return tmp_path / "model" / "transformer"


def test_reads_what_was_written(written):
    pipe = vivace.load(written[0], dtype="bfloat16")
    assert type(pipe).__name__ == "FluxPipeline"
    assert pipe.transformer.dtype == torch.bfloat16
    assert torch.equal(output(pipe.transformer), written[1])
    held = sum(t.nbytes for t in (*pipe.transformer.parameters(), *pipe.transformer.buffers()))
    file = (written[0] / "transformer" / folder.WEIGHTS).stat().st_size
    assert held == pytest.approx(file, rel=0.2)
    report = vivace.report(vivace.accelerate(pipe, fuse="off"))
    assert "fp8" in next(note.detail for note in report.passes if note.name == "quant")
    assert "as loaded" in str(report)
    with pytest.raises(InputError, match="in fp8 already"):
        vivace.accelerate(pipe, quant="int8")
    vivace.restore(pipe)
    assert torch.equal(output(pipe.transformer), written[1])


def test_another_dtype(written):
    pipe = vivace.load(written[0], dtype="float32")
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.float32}
    values = [m.values.dtype for m in pipe.transformer.modules() if isinstance(m, QuantLinear)]
    assert set(values) == {torch.float8_e4m3fn, torch.int8}
    torch.testing.assert_close(output(pipe.transformer), written[1].float(), rtol=0.1, atol=0.05)


@pytest.mark.parametrize("name", ["wan", "pixart"])
def test_what_a_class_keeps_in_32_bit_stays_so(tmp_path, name):
    """Norms and tables of positions, whatever the rest is read as."""
    family = FAMILIES[name]
    family.tiny().save_pretrained(tmp_path / "stock")
    pipe = vivace.load(tmp_path / "stock", dtype="bfloat16", device="cpu")
    vivace.accelerate(pipe, quant="int8", keep_base="no", fuse="off")
    folder.write(pipe, tmp_path / "few", denoisers={"transformer": pipe.transformer})
    arguments = family.inputs(pipe.transformer, size=(64, 64), batch=1, frames=1, text_tokens=8, seed=0)
    made, again = pipe.transformer, vivace.load(tmp_path / "few", dtype="bfloat16", device="cpu").transformer
    types, found = ({key: t.dtype for key, t in (*m.named_parameters(), *m.named_buffers())} for m in (made, again))
    assert found == types
    assert torch.float32 in {t.dtype for t in (*again.parameters(), *again.buffers())}
    with torch.no_grad():
        assert torch.equal(again(**arguments)[0], made(**arguments)[0])


@pytest.mark.parametrize("format", FORMATS)
def test_every_format(format, tmp_path):
    pipe = FAMILIES["sd"].tiny()
    arguments = FAMILIES["sd"].inputs(pipe.unet, size=(64, 64), batch=1, frames=1, text_tokens=8, seed=0)
    vivace.accelerate(pipe, quant=format, keep_base="no")
    folder.write(pipe, tmp_path, denoisers={"unet": pipe.unet})
    again = folder.read(tmp_path / "unet", device=torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(again(**arguments)[0], pipe.unet(**arguments)[0], rtol=1e-3, atol=1e-3)


def test_a_pipeline_of_no_known_family(tmp_path):
    small = {"sample_size": 4, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "out_channels": 8}
    pipe = DiTPipeline(DiTTransformer2DModel(**small).eval(), AutoencoderKL(), DDIMScheduler())
    vivace.accelerate(pipe, quant="int8", keep_base="no")
    folder.write(pipe, tmp_path, denoisers={"transformer": pipe.transformer})
    arguments = {"timestep": torch.tensor([3]), "class_labels": torch.tensor([1])}
    with torch.no_grad():
        made, again = (
            one.transformer(torch.ones(1, 4, 4, 4), **arguments).sample for one in (pipe, vivace.load(tmp_path))
        )
    assert torch.equal(made, again)


def test_every_tensor_lies_where_kernels_want_it(tmp_path):
    """In the file they lie close together, from any address on; torch's int8 kernel ends the process there."""
    pipe = FAMILIES["sdxl"].tiny().to(torch.float16)
    vivace.accelerate(pipe, quant="int8_weights", keep_base="no")
    folder.write(pipe, tmp_path, denoisers={"unet": pipe.unet})
    unet = folder.read(tmp_path / "unet", device=torch.device("cpu"), dtype=torch.float32)
    held = (*unet.parameters(), *unet.buffers())
    assert all(tensor.data_ptr() % 64 == 0 for tensor in held)
    arguments = FAMILIES["sdxl"].inputs(unet, size=(64, 64), batch=4, frames=1, text_tokens=2, seed=0)
    with torch.no_grad():
        assert unet(**arguments)[0].isfinite().all()


def test_truncated(copied):
    path = copied / folder.WEIGHTS
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(InputError, match="truncated") as caught:
        vivace.load(copied.parent)
    assert str(path) in str(caught.value)


def test_altered(copied):
    path = copied / folder.WEIGHTS
    tensors = load_file(path)
    next(iter(tensors.values())).view(torch.uint8).flatten()[0] ^= 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"quantised\.safetensors is not the file that quantised\.json"):
        vivace.load(copied.parent)


@pytest.mark.parametrize(
    "change",
    [
        {"layers": {}},
        {"layers": {"transformer_blocks.0.attn.to_q": {"format": "int8_weights", "how": "rowwise"}}},
        {"class": "SD3Transformer2DModel"},
        {"dtype": "load"},
        {"sha256": {}},
        {"seal": None},
    ],
)
@pytest.mark.parametrize("reads", [vivace.load, vivace.plan])
def test_an_altered_record(copied, change, reads):
    path = copied / folder.RECORD
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=r"quantised\.json was altered since it was written"):
        reads(copied.parent)


@pytest.mark.parametrize(
    ("text", "said"), [("{", "cannot be read"), ("[1]", "cannot be read"), ('{"version": 2}', "another version")]
)
def test_a_record_of_something_else(copied, text, said):
    (copied / folder.RECORD).write_text(text)
    with pytest.raises(InputError, match=rf"quantised\.json .*{said}"):
        vivace.load(copied.parent)


@pytest.mark.parametrize("reads", [vivace.load, vivace.plan])
def test_an_altered_configuration(copied, reads):
    path = copied / folder.CONFIG
    path.write_text(path.read_text().replace('"num_layers": 2', '"num_layers": 1'))
    with pytest.raises(InputError, match=r"config\.json is not the file that quantised\.json"):
        reads(copied.parent)


@pytest.mark.parametrize("reads", [vivace.load, vivace.plan])
def test_a_missing_record(copied, reads):
    (copied / folder.RECORD).unlink()
    with pytest.raises(InputError, match=r"quantised\.json cannot be read"):
        reads(copied.parent)


def test_a_missing_weight_file(copied):
    (copied / folder.WEIGHTS).unlink()
    with pytest.raises(InputError, match="no weight file"):
        vivace.load(copied.parent)


def test_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "PIECE", 10)
    path = tmp_path / "file"
    path.write_bytes(bytes(range(25)))
    first = folder.digests(path)
    path.write_bytes(bytes(range(24)) + b"x")
    assert len(first) == 3
    assert [a == b for a, b in zip(first, folder.digests(path), strict=True)] == [True, True, False]


def test_only_its_own_folders_are_replaced(written, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds no quantised model"):
        folder.write(FAMILY.tiny(), tmp_path, denoisers={})
    assert (tmp_path / "notes.txt").exists()


FAULTS = [
    (OSError(28, "No space left"), InputError),
    (SafetensorError("I/O error"), InputError),
    (KeyboardInterrupt(), KeyboardInterrupt),
]


@pytest.mark.parametrize(("fault", "raised"), FAULTS)
def test_what_was_there_stays_until_all_is_written(written, tmp_path, monkeypatch, fault, raised):
    pipe = vivace.load(written[0], dtype="bfloat16")
    model = tmp_path / "model"
    folder.write(pipe, model, denoisers={"transformer": pipe.transformer})
    before = {path: path.read_bytes() for path in model.rglob("*") if path.is_file()}

    def full(*args, **kwargs):
        raise fault

    with monkeypatch.context() as patch:
        patch.setattr(folder, "save_file", full)
        for where in (model, tmp_path / "new"):
            with pytest.raises(raised):
                folder.write(pipe, where, denoisers={"transformer": pipe.transformer})
    assert {path: path.read_bytes() for path in model.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "new").exists()
    # What a process left that was ended in the middle is in nobody's way.
    (model / folder.PART).mkdir()
    folder.write(pipe, model, denoisers={"transformer": pipe.transformer})
    assert {path.relative_to(model) for path in model.rglob("*")} >= {path.relative_to(model) for path in before}
    assert not (model / folder.PART).exists()
