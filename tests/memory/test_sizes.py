"""Bytes of components from files and from facts, before anything is loaded."""

import pytest
import torch

from vivace import InputError
from vivace.families import FAMILIES
from vivace.load import Source, find
from vivace.memory.sizes import components_of
from vivace.plan import source_of


def test_a_folder_is_counted_in_its_files(tmp_path):
    pipe = FAMILIES["sd3"].tiny()
    pipe.save_pretrained(tmp_path)
    # The same tensors again, in 16 bit, as hub repositories often have them.
    pipe.transformer.half().save_pretrained(tmp_path / "transformer", variant="fp16")
    parts = components_of(find(tmp_path), dtype=torch.bfloat16)
    assert next(iter(parts)) == "transformer"
    assert set(parts) == {"transformer", "text_encoder", "text_encoder_2", "vae"}
    for name, part in parts.items():
        weights = getattr(pipe, name).state_dict().values()
        assert part.parameters == sum(weight.numel() for weight in weights if weight.is_floating_point())
        assert part.nbytes == 2 * part.parameters


def test_a_known_model_is_counted_from_its_facts():
    parts = components_of(source_of("flux:schnell"), dtype=torch.bfloat16)
    assert list(parts) == ["transformer", "vae", "text_encoder", "text_encoder_2"]
    assert parts["transformer"].parameters == FAMILIES["flux"].variants["schnell"].parameters
    assert components_of(source_of("flux:schnell"), dtype=torch.float32)["vae"].nbytes == 2 * parts["vae"].nbytes


def test_two_experts_are_two_components():
    assert "transformer_2" in components_of(source_of("wan:2.2-t2v-a14b"), dtype=torch.bfloat16)
    assert "transformer_2" not in components_of(source_of("wan:2.1-t2v-1.3b"), dtype=torch.bfloat16)


def test_an_unknown_model_that_is_not_here_is_refused():
    with pytest.raises(InputError, match="nothing is known of the sizes in someone/model"):
        components_of(Source(name="someone/model", path=None, pipeline="OddPipeline", family=None), dtype=torch.float32)
