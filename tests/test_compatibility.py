"""Every pair of features works, or is refused before anything is changed; docs/compatibility.md is made of this.

`python tests/test_compatibility.py` writes the page anew.
"""

import copy
import itertools
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import vivace
from vivace import InputError
from vivace.families import FAMILIES

PAGE = Path(__file__).parent.parent / "docs" / "compatibility.md"


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One thing that people switch on."""

    name: str
    fields: dict  # of Config
    adapter: bool = False  # whether a LoRA is loaded with it
    gpu: bool = False
    slow: bool = False
    tolerance: float = 1e-3  # of the picture's error to the picture


FEATURES = (
    Feature(name="attention cudnn", fields={"attention": "cudnn"}, gpu=True, tolerance=2e-2),
    Feature(name="NaN guard", fields={"check_nan": True}),
    Feature(name="LoRA merged", fields={"lora": "merged"}, adapter=True),
    Feature(name="LoRA beside", fields={"lora": "side"}, adapter=True),
    Feature(name="LoRA left to PEFT", fields={"lora": "off"}, adapter=True),
    Feature(name="int8 linears", fields={"quant": "int8"}, tolerance=0.2),
    Feature(name="int8 text encoders", fields={"encoders": "int8_weights"}, tolerance=0.2),
    Feature(name="step cache", fields={"cache": "firstblock:threshold=0.05"}, tolerance=0.2),
    Feature(name="VAE in strips", fields={"vram": "strips"}),
    Feature(name="encoders streamed", fields={"vram": "encoders"}),
    Feature(name="blocks streamed", fields={"vram": "streamed"}),
    Feature(name="fused blocks", fields={"fuse": "on"}),
    Feature(name="torch.compile", fields={"compile": "on"}, slow=True),
    Feature(name="CUDA graphs", fields={"graphs": "on"}, gpu=True),
)

REFUSED = {
    ("NaN guard", "CUDA graphs"): "check_nan waits for the device",
    ("blocks streamed", "torch.compile"): "its blocks are streamed",
    ("fused blocks", "torch.compile"): "takes the same blocks",
    ("LoRA left to PEFT", "fused blocks"): "transformer_blocks.0",
}
"""Pairs that are refused, with a part of the reason. Every other pair works."""

WHY = {
    "check_nan waits for the device": "the guard waits for the device at every attention, which a recording cannot",
    "its blocks are streamed": "what is compiled would have to be anew when weights come to another place",
    "takes the same blocks": "both take the same blocks",
    "transformer_blocks.0": "fused blocks would not see PEFT's layers; merged or beside they do",
}


def pairs():
    """Pairs that set different fields."""
    for pair in itertools.combinations(FEATURES, 2):
        if not set(pair[0].fields) & set(pair[1].fields):
            yield pair


def page() -> str:
    """The matrix, as Markdown."""
    names = [feature.name for feature in FEATURES]
    reasons = list(WHY)
    lines = [
        "# What goes with what",
        "",
        "Every pair works or is refused before anything is changed; `tests/test_compatibility.py` runs each of them on",
        "small models, compares the pictures with the stock pipeline's, restores it bit for bit, and holds this page",
        "to what it found. A number is the reason of a refusal, below; a dash marks two values of one setting.",
        "",
        "| |" + "|".join(str(number) for number in range(1, len(names) + 1)) + "|",
        "|---" * (len(names) + 1) + "|",
    ]
    possible = {frozenset((a.name, b.name)) for a, b in pairs()}
    for number, first in enumerate(names, start=1):
        cells = []
        for second in names:
            refused = REFUSED.get((first, second)) or REFUSED.get((second, first))
            works = "" if first == second else "yes" if frozenset((first, second)) in possible else "–"
            cells.append(f"no ({reasons.index(refused) + 1})" if refused else works)
        lines.append(f"|{number} {first}|" + "|".join(cells) + "|")
    lines += ["", *(f"{number}. {why[0].upper()}{why[1:]}." for number, why in enumerate(WHY.values(), start=1))]
    gpu = ", ".join(feature.name for feature in FEATURES if feature.gpu)
    return "\n".join([*lines, "", f"Pairs with {gpu} are tested on a GPU, all others on every machine.", ""])


def picture(pipe, device):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    arguments = {"num_inference_steps": 2, "height": 64, "width": 64, "generator": generator, "output_type": "pt"}
    return pipe("a fox", **arguments).images.to(device)


def live_through(first, second, *, device, lora_of, monkeypatch):
    """Accelerate with both features; compare with the stock pipeline, and what is restored with what was."""
    if device == "cpu":
        import importlib

        place = torch.device(device)
        monkeypatch.setattr(
            importlib.import_module("vivace.accelerate"), "device_for", lambda config: place if config.vram else None
        )
    pipe = FAMILIES["sd3"].tiny().to(device)
    if first.adapter or second.adapter:
        pipe.load_lora_weights(lora_of(pipe.transformer, std=0.3), adapter_name="a")
    stock = copy.deepcopy(pipe)
    wanted = picture(stock, device)
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    fields = {**first.fields, **second.fields}
    refused = REFUSED.get((first.name, second.name))
    if refused:
        with pytest.raises(InputError, match=refused):
            vivace.accelerate(pipe, **fields)
        assert vivace.report(pipe).preset is None
        return
    vivace.accelerate(pipe, **fields)
    tolerance = max(first.tolerance, second.tolerance)
    for _ in range(2):
        assert (picture(pipe, device) - wanted).norm() < tolerance * wanted.norm()
    notes = {note.name: note for note in vivace.report(pipe).passes}
    assert all(notes[name].done for name in fields if name in notes and fields[name] != "off")
    vivace.restore(pipe)
    after = pipe.transformer.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def cases():
    for first, second in pairs():
        marks = [pytest.mark.gpu] if first.gpu or second.gpu else []
        marks += [pytest.mark.full] if first.slow or second.slow else []
        yield pytest.param(first, second, marks=marks, id=f"{first.name} with {second.name}")


@pytest.mark.parametrize(("first", "second"), [*cases()])
def test_a_pair(first, second, lora_of, monkeypatch):
    device = "cuda" if first.gpu or second.gpu else "cpu"
    live_through(first, second, device=device, lora_of=lora_of, monkeypatch=monkeypatch)


def test_the_page_says_so():
    assert {*itertools.chain(*REFUSED)} <= {feature.name for feature in FEATURES}
    assert set(REFUSED.values()) == set(WHY)
    assert PAGE.read_text("utf-8") == page(), "run: python tests/test_compatibility.py"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
