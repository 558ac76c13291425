"""`vivace errors`: every kind of layer, the whole, and what cannot be done in one line."""

import json

import pytest

from vivace import cli
from vivace.attention import BACKENDS
from vivace.families import FAMILIES


def code_of(*arguments: str) -> object:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    return end.value.code


def test_every_kind_of_layer(capsys):
    assert code_of("errors", "flux", "--tiny", "--device", "cpu", "--dtype", "float32", "--json") == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["errors"]["quant=fp8"]
    assert 0.02 < found["transformer_blocks.*.attn.to_q"] < 0.06
    assert 0.001 < found["single_transformer_blocks.*.norm.linear"] < 0.012
    assert 1e-4 < found["whole forward"] < 0.1


def test_a_table_of_attention(capsys, monkeypatch):
    monkeypatch.setitem(BACKENDS, "rough", "vivace.attention.native:NATIVE")
    arguments = ("errors", "sd", "--tiny", "--device", "cpu", "--quant", "none", "--attention")
    assert code_of(*arguments, "rough") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("attention=rough")
    assert any("0.00%  down_blocks.*.attentions.*.transformer_blocks.*.attn1" in line for line in lines)
    assert code_of(*arguments, "cudnn_fp8") == 2
    assert "attention='cudnn_fp8' cannot be done here" in capsys.readouterr().err
    assert code_of(*arguments, "cudn") == 2
    assert "--attention is none or one of native" in capsys.readouterr().err


def test_nothing_to_measure(capsys):
    assert code_of("errors", "sd", "--tiny", "--device", "cpu", "--quant", "none") == 2
    assert "nothing to measure: --quant and --attention are both none" in capsys.readouterr().err


def test_a_model_that_came_in_few_bits(tmp_path, capsys):
    FAMILIES["flux"].tiny().save_pretrained(tmp_path / "model")
    assert code_of("quantize", str(tmp_path / "model"), "-o", str(tmp_path / "small"), "--quant", "int8") == 0
    assert code_of("errors", "flux", "--model", str(tmp_path / "small"), "--device", "cpu") == 2
    assert "came in few bits, so what they cost cannot be told; give it in 16 bit" in capsys.readouterr().err
