"""A LoRA's linear against PEFT's own, and what of a student needs autocast."""

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import Linear
from torch import nn

from vivace.distill import Student
from vivace.distill.low_rank import LowRank, cast_at_once
from vivace.distill.student import casts_itself, make_student, trainable
from vivace.families import FAMILIES


def layers(kind, *, bias=True, scale=1.0):
    """PEFT's layer and ours over the same weights, of which B is not 0."""
    torch.manual_seed(0)
    base = nn.Linear(24, 16, bias=bias).to(kind).requires_grad_(False)
    config = LoraConfig(r=4, lora_alpha=4 * scale, target_modules=["0"])
    stock = inject_adapter_in_model(config, nn.Sequential(base), adapter_name="student")[0]
    assert type(stock) is Linear
    for parameter in trainable(stock).values():
        parameter.data = torch.randn_like(parameter, dtype=torch.float32)
    ours = copy.deepcopy(stock)
    ours.__class__ = LowRank
    return stock, ours


def learnt(layer, x, *, autocast=False):
    """What a layer makes of x, and the gradients of x and of what it learns."""
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = layer(x)
    out.float().square().sum().backward()
    return [out.float(), x.grad.float(), *(parameter.grad for parameter in trainable(layer).values())]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_it_computes_and_learns_what_peft_does(bias, scale):
    stock, ours = layers(torch.float32, bias=bias, scale=scale)
    x = torch.randn(2, 5, 24)
    for mine, theirs in zip(learnt(ours, x), learnt(stock, x), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-4)


def test_in_bfloat16_it_is_as_exact_as_peft_under_autocast():
    stock, ours = layers(torch.bfloat16)
    x = torch.randn(2, 5, 24).bfloat16()
    exact = learnt(copy.deepcopy(stock).float(), x.float())
    for mine, theirs, true in zip(learnt(ours, x), learnt(stock, x, autocast=True), exact, strict=True):
        assert (mine - true).norm() < 1.2 * (theirs - true).norm()
    assert ours(x).dtype == torch.bfloat16
    assert {parameter.grad.dtype for parameter in trainable(ours).values()} == {torch.float32}


def test_under_autocast_it_is_pefts():
    stock, ours = layers(torch.float32)
    x = torch.randn(2, 5, 24)
    for mine, theirs in zip(learnt(ours, x, autocast=True), learnt(stock, x, autocast=True), strict=True):
        assert torch.equal(mine, theirs)


def test_weights_cast_at_once_are_those_of_every_call():
    """Also after a step, in which they change, and where activations are computed again."""
    teacher = FAMILIES["sdxl"].tiny().unet.requires_grad_(False).bfloat16()
    inputs = FAMILIES["sdxl"].inputs(teacher, size=(64, 64), batch=1, text_tokens=7)
    found = []
    for at_once in (False, True):
        student = make_student(teacher, Student(rank=2, gradient_checkpointing=True))
        if at_once:
            cast_at_once(student)
        weights = list(trainable(student).values())
        optimizer = torch.optim.AdamW(weights, lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            student(**inputs)[0].float().square().mean().backward()
            optimizer.step()
        found.append([*weights, *(weight.grad for weight in weights), student(**inputs)[0]])
        layers = [module for module in student.modules() if isinstance(module, LowRank)]
        assert all((layer.casts is not None) == at_once for layer in layers)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    # which differ from the first ones
    assert float(found[0][1].detach().abs().max()) > 0.05


def test_it_takes_few_products_and_keeps_little():
    """Three products forward, five backward: PEFT's has as many, and four casts, a scaling and a sum around them."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Launches(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found.append(function.overloadpacket.__name__)
            return function(*args, **kwargs or {})

    _, ours = layers(torch.float32)
    x = torch.randn(2, 5, 24, requires_grad=True)
    kept = []
    found: list[str] = []
    with Launches(), torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        out = ours(x)
        assert sorted(one for one in found if "mm" in one) == ["addmm", "addmm", "mm"]
        assert {"_to_copy", "add", "mul"}.isdisjoint(found)
        found.clear()
        out.backward(torch.ones_like(out))
    assert sorted(one for one in found if "mm" in one) == ["addmm", "mm", "mm", "mm", "mm"]
    assert {one.numel() for one in kept} == {10 * 24, 10 * 4}


@pytest.mark.parametrize("name", ["sd3", "sdxl", "flux"])
def test_a_lora_student_in_bfloat16_needs_no_autocast(name):
    family = FAMILIES[name]
    teacher = getattr(family.tiny(), family.denoisers[0]).requires_grad_(False)
    assert not casts_itself(make_student(teacher, Student(rank=2)), torch.bfloat16)
    teacher = teacher.bfloat16()
    student = make_student(teacher, Student(rank=2))
    assert casts_itself(student, torch.bfloat16)
    assert any(isinstance(module, LowRank) for module in student.modules())
    assert not casts_itself(make_student(teacher, Student(kind="full")), torch.bfloat16)


def test_a_lora_of_convolutions_needs_autocast():
    teacher = FAMILIES["sdxl"].tiny().unet.requires_grad_(False).bfloat16()
    student = make_student(teacher, Student(rank=2, targets=("to_q", "conv1")))
    assert not casts_itself(student, torch.bfloat16)
