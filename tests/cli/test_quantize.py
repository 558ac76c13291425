"""`vivace quantize`: writes a folder that loads, and refuses what it cannot do in one line."""

import json
import shutil

import pytest
import torch

import vivace
from vivace import cli
from vivace.families import FAMILIES
from vivace.load import find


def code_of(*arguments: str) -> object:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    return end.value.code


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    FAMILIES["sd"].tiny().save_pretrained(folder)
    return folder


def test_writes_a_folder_that_loads(model, tmp_path, capsys):
    out = tmp_path / "small"
    assert code_of("quantize", str(model), "-o", str(out), "--quant", "int8", "--json") == 0
    made = json.loads(capsys.readouterr().out.splitlines()[-1])
    stock = (model / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert made["bytes"]["unet"] == (out / "unet" / "quantised.safetensors").stat().st_size < stock
    assert any(layer["format"] == "int8" for layer in made["layers"]["unet"])
    picture = vivace.load(out)("a fox", num_inference_steps=2, output_type="pt").images
    assert torch.isfinite(torch.as_tensor(picture)).all()


def test_what_a_model_was_made_for_goes_with_it(model, tmp_path):
    source, out = tmp_path / "model", tmp_path / "small"
    shutil.copytree(model, source)
    (source / "vivace.json").write_text('{"steps": 7, "guidance": 1.5}')
    assert code_of("quantize", str(source), "-o", str(out), "--quant", "int8") == 0
    assert find(out).defaults == find(source).defaults == {"steps": 7, "guidance": 1.5}


def test_an_unknown_format_writes_nothing(model, tmp_path, capsys):
    assert code_of("quantize", str(model), "-o", str(tmp_path / "out"), "--quant", "fp3") == 2
    assert "--quant is one of fp8, int8" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists(model, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert code_of("quantize", str(model), "-o", str(tmp_path)) == 2
    assert code_of("quantize", str(model), "-o", str(tmp_path), "--overwrite") == 2
    assert "holds no quantised model" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_model_is_never_written_over_and_a_failure_costs_nothing(model, tmp_path, capsys):
    out = tmp_path / "small"
    assert code_of("quantize", str(model), "-o", str(out), "--quant", "int8") == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    for source, format, said in (
        (out, "int8", "is where the model itself lies"),
        (out / "unet" / "..", "int8", "is where the model itself lies"),
        (tmp_path / "nowhere", "int8", "no model at"),
    ):
        assert code_of("quantize", str(source), "-o", str(out), "--overwrite", "--quant", format) == 2
        assert said in capsys.readouterr().err
    other = tmp_path / "other"
    assert code_of("quantize", str(out), "-o", str(other), "--quant", "int8") == 0
    assert code_of("quantize", str(other), "-o", str(out), "--overwrite", "--quant", "fp8") == 2
    assert "its layers are in int8 already" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert code_of("quantize", str(model), "-o", str(out), "--overwrite", "--quant", "fp8") == 0
