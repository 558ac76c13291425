"""Prompt files, and prompts that are too long."""

import pytest

from vivace.errors import InputError
from vivace.families import FAMILIES
from vivace.generation.prompt import cuts, read_prompts


def test_one_prompt_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa red circle\r\n\r\n  ein grünes Dreieck \n".encode())
    assert read_prompts(path) == ("a red circle", "ein grünes Dreieck")


@pytest.mark.parametrize("content", [b"", b"\n  \n", b"\xff\xfe\x00\xd8"])
def test_a_file_without_prompts_is_refused(tmp_path, content):
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(InputError, match=r"holds no prompt|cannot be read as text"):
        read_prompts(tmp_path / "prompts.txt")
    with pytest.raises(InputError, match="cannot be read as text: No such file"):
        read_prompts(tmp_path / "none.txt")


def test_cuts_name_exactly_what_the_encoder_does_not_see():
    pipe = FAMILIES["sd"].tiny()
    kept = ("a small red circle " * 30).split()
    while cuts(pipe, " ".join(kept)):
        kept.pop()
    assert len(kept) > 20
    # The tokenizer itself, told to cut, agrees on where.
    text = f"{' '.join(kept)} above a blue square"
    (room, rest) = cuts(pipe, text)["tokenizer"]
    seen = pipe.tokenizer(text, truncation=True, max_length=room).input_ids
    assert room == pipe.tokenizer.model_max_length == len(seen)
    assert pipe.tokenizer.decode(seen, skip_special_tokens=True).split() + rest.split() == text.split()
    assert cuts(pipe, "a red circle", longest=4).keys() == {"tokenizer"}
