"""What a training leaves, read by stock diffusers, by ComfyUI's rules, and by `use_few_step`."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LCMScheduler
from safetensors.torch import load_file

from vivace.distill import Student
from vivace.distill.result import write_result
from vivace.distill.student import make_student, trainable
from vivace.distill.weights import state_of
from vivace.families import FAMILIES
from vivace.few_step import ENDS, WEIGHTS, use_few_step

# family -> a choice of targets that its ready configs name
TARGETS = {
    "sd": ("to_q", "to_k", "to_v", "to_out.0"),
    "sdxl": ("to_q", "to_k", "to_v", "to_out.0"),
    "pixart": ("to_q", "to_out.0", "net.0.proj", "net.2", "proj_out", "linear", "linear_1", "linear_2"),
    "sd3": (
        "to_q",
        "add_k_proj",
        "to_add_out",
        "net.0.proj",
        "net.2",
        "norm1.linear",
        "proj_out",
        "linear_1",
        "linear_2",
    ),
    "flux": ("to_q", "add_k_proj", "net.2", "proj_mlp"),
}


@pytest.fixture(scope="module", params=TARGETS)
def made(request, config, tmp_path_factory):
    """A student of some family that was changed at random, and its result: slot, family, student, folder, inputs."""
    family = FAMILIES[request.param]
    pipe, slot = family.tiny(), family.denoisers[0]
    chosen = config(student=Student(rank=3, targets=TARGETS[request.param]))
    student = make_student(getattr(pipe, slot), chosen.student)
    torch.manual_seed(5)
    for parameter in trainable(student).values():
        parameter.data = (0.3 * torch.randn_like(parameter)).half().float()
    folder = write_result(
        student, state_of(student), pipe, chosen, tmp_path_factory.mktemp("made") / "result", slot=slot
    )
    inputs = family.inputs(getattr(pipe, slot), size=(64, 64), batch=1, text_tokens=7)
    return slot, family, student, folder, inputs


def out(denoiser, inputs):
    with torch.no_grad():
        return denoiser(**inputs)[0]


def test_stock_loading_gives_the_student(made):
    slot, family, student, folder, inputs = made
    pipe = family.tiny()
    if not hasattr(pipe, "load_lora_weights"):
        pytest.skip("stock diffusers loads no LoRA into this pipeline")
    before = out(getattr(pipe, slot), inputs)
    pipe.load_lora_weights(folder, weight_name=WEIGHTS)
    after = out(getattr(pipe, slot), inputs)
    assert torch.allclose(after, out(student, inputs), atol=1e-4)
    assert (after - before).abs().max() > 1e-3


def test_use_few_step_gives_the_student(made):
    slot, family, student, folder, inputs = made
    pipe = use_few_step(family.tiny(), folder)
    assert torch.allclose(out(getattr(pipe, slot), inputs), out(student, inputs), atol=1e-3)
    assert not any("lora" in name for name, _ in getattr(pipe, slot).named_modules())


def test_comfyui_reads_every_key(made):
    """ComfyUI's rules (comfy/lora.py and weight_adapter/lora.py): `lora_unet_` and a UNet's diffusers name with
    underscores, `transformer.` and a transformer's diffusers name; `lora_up` or `lora_B` times the other half, by alpha
    over rank where there is an alpha, else by 1.
    """
    slot, family, student, folder, inputs = made
    denoiser = getattr(family.tiny(), slot)
    rules = {
        "unet": lambda name: f"lora_unet_{name.replace('.', '_')}",
        "transformer": lambda name: f"transformer.{name}",
    }
    weights = load_file(folder / WEIGHTS)
    read = set()
    for name, parameter in denoiser.named_parameters():
        layer = rules[slot](name.removesuffix(".weight"))
        down, up = (weights.get(layer + end) for end in ENDS[slot])
        if not name.endswith(".weight") or down is None or up is None:
            continue
        read |= {layer + end for end in ENDS[slot]} | ({f"{layer}.alpha"} & weights.keys())
        alpha = weights.get(f"{layer}.alpha")
        scale = 1.0 if alpha is None else float(alpha) / down.shape[0]
        parameter.data += scale * (up.float().flatten(1) @ down.float().flatten(1)).reshape(parameter.shape)
    assert read == set(weights)
    assert torch.allclose(out(denoiser, inputs), out(student, inputs), atol=1e-3)


def test_the_scheduler_is_a_stock_one(made):
    _, family, _, folder, _ = made
    values = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    if family.prediction == "flow":
        assert FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler").config.stochastic_sampling
    else:
        scheduler = LCMScheduler.from_pretrained(folder / "scheduler")
        scheduler.set_timesteps(4)
        assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    assert values["_class_name"] in ("FlowMatchEulerDiscreteScheduler", "LCMScheduler")


def test_the_facts(made):
    _, family, _, folder, _ = made
    facts = json.loads((folder / "vivace.json").read_text())
    assert facts == {"steps": 4, "guidance": 3.0 if family.name == "flux" else 1.0}


def test_a_full_student_is_a_denoiser(config, tmp_path):
    pipe = FAMILIES["sd3"].tiny()
    student = make_student(pipe.transformer, Student(kind="full"))
    student.proj_out.weight.data += 0.1
    chosen = config(student=Student(kind="full"))
    folder = write_result(student, state_of(student), pipe, chosen, tmp_path / "result", slot="transformer")
    found = use_few_step(FAMILIES["sd3"].tiny(), folder)
    inputs = FAMILIES["sd3"].inputs(student, size=(64, 64), batch=1, text_tokens=7)
    assert torch.allclose(out(found.transformer, inputs), out(student, inputs), atol=1e-5)


def test_a_result_is_removed_only_when_the_next_stands_in_its_place(config, tmp_path, monkeypatch):
    pipe, folder = FAMILIES["sd3"].tiny(), tmp_path / "result"
    student = make_student(pipe.transformer, config().student)
    write_result(student, state_of(student), pipe, config(), folder, slot="transformer")
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    removed, remove = [], shutil.rmtree

    def killed(path, **rest):
        if Path(path).name == ".result.old" and Path(path).exists():
            removed.append({file.name for file in folder.iterdir()})
            raise KeyboardInterrupt
        remove(path, **rest)

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        write_result(student, state_of(student), pipe, config(), folder, slot="transformer")
    assert removed == [{*before, "scheduler"}]
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before
    monkeypatch.undo()
    write_result(student, state_of(student), pipe, config(), folder, slot="transformer")
    assert [path.name for path in tmp_path.iterdir()] == ["result"]
