"""The student: what it shares, what it owns, its running mean."""

import pytest
import torch

from vivace.distill import Student
from vivace.distill.student import make_student, trainable
from vivace.errors import InputError
from vivace.families import FAMILIES


@pytest.fixture(scope="module")
def teacher():
    return FAMILIES["sd3"].tiny().transformer.requires_grad_(False)


def test_a_lora_student_shares_every_weight(teacher):
    student = make_student(teacher, Student(rank=2))
    own = {parameter.data_ptr() for parameter in trainable(student).values()}
    shared = {parameter.data_ptr() for parameter in student.parameters()} - own
    assert shared == {parameter.data_ptr() for parameter in teacher.parameters()}
    assert not any(module in set(teacher.modules()) for module in student.modules())
    assert "lora" not in "".join(name for name, _ in teacher.named_modules())


def test_a_full_student_shares_none(teacher):
    student = make_student(teacher, Student(kind="full"))
    theirs = {parameter.data_ptr() for parameter in teacher.parameters()}
    assert not theirs & {parameter.data_ptr() for parameter in student.parameters()}
    assert set(trainable(student)) == {name for name, _ in teacher.named_parameters()}
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_the_seed_draws_the_lora(teacher):
    one, same, other = (trainable(make_student(teacher, Student(rank=2), seed=seed)) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_targets_that_fit_nothing_are_refused(teacher):
    with pytest.raises(InputError, match=r"student\.targets \['to_everything'\] fit nothing"):
        make_student(teacher, Student(targets=("to_everything",)))


def test_gradient_checkpointing_changes_no_gradient(teacher):
    inputs = FAMILIES["sd3"].inputs(teacher, size=(64, 64), batch=1, text_tokens=7)
    found = []
    for again in (False, True):
        student = make_student(teacher, Student(rank=2, gradient_checkpointing=again))
        student(**inputs)[0].square().mean().backward()
        found.append({name: p.grad for name, p in trainable(student).items()})
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-6) for name in found[0])
