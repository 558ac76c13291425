"""The running mean, by hand."""

import torch

from vivace.distill import Student
from vivace.distill.mean import Mean
from vivace.distill.student import make_student, trainable
from vivace.families import FAMILIES


def test_the_mean_by_hand_and_inside():
    teacher = FAMILIES["sd3"].tiny().transformer
    student = make_student(teacher, Student(rank=2))
    mean = Mean(student, 0.5)
    name, parameter = next(iter(trainable(student).items()))
    before = parameter.detach().clone()
    with torch.no_grad():
        parameter.add_(1.0)
    mean.update(student, batch=1000)
    assert torch.allclose(mean.weights[name], before + 0.5)
    with mean.inside(student):
        assert torch.allclose(parameter, before + 0.5)
    assert torch.allclose(parameter, before + 1.0)
    # at the first batch the mean is nearly the weights: (1 + 0) / (10 + 0)
    mean = Mean(student, 0.999)
    with torch.no_grad():
        parameter.add_(1.0)
    mean.update(student, batch=0)
    assert torch.allclose(mean.weights[name], before + 1.9)
