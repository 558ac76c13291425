"""`vivace merge` on the command line."""

import pytest
from safetensors.torch import save_file

from vivace import cli
from vivace.families import FAMILIES


def merge(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(["merge", *map(str, arguments)])
    return end.value.code


def test_a_folder_is_written_once(tmp_path, lora_of, capsys):
    pipe = FAMILIES["sd3"].tiny()
    pipe.save_pretrained(tmp_path / "model")
    save_file(lora_of(pipe.transformer), tmp_path / "style.safetensors")
    arguments = (tmp_path / "model", f"{tmp_path / 'style.safetensors'}:0.5", "-o", tmp_path / "out")
    capsys.readouterr()
    assert merge(*arguments) == 0
    said = capsys.readouterr()
    assert said.out.strip().endswith(str(tmp_path / "out"))
    assert said.err == ""
    assert (tmp_path / "out" / "model_index.json").is_file()
    assert merge(*arguments) == 2
    assert "is left alone" in capsys.readouterr().err
    assert merge(tmp_path / "model", tmp_path / "absent.safetensors", "-o", tmp_path / "new") == 2
    assert "no weight file" in capsys.readouterr().err
    for weight in ("nan", "inf"):
        assert merge(tmp_path / "model", f"{tmp_path / 'style.safetensors'}:{weight}", "-o", tmp_path / "new") == 2
        assert f"'{weight}' is not a number" in capsys.readouterr().err
