"""Which format a GPU gets, and which of a model's linears gain from it."""

import pytest
import torch

from vivace.quant import FORMATS, format_of, rules
from vivace.quant.rules import RULES, best_format, rule_for

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch):
    """Lets CUDA devices have a compute capability."""
    return lambda *sm: monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: sm)


@pytest.mark.parametrize(
    ("sm", "best", "refused"),
    [
        ((7, 0), None, {"fp8", "int8"}),
        ((7, 5), "int8", {"fp8"}),
        ((8, 6), "int8", {"fp8"}),
        ((8, 9), "fp8", set()),
        ((9, 0), "fp8", set()),
        ((12, 0), "fp8", set()),
    ],
)
def test_what_a_gpu_can(gpu, sm, best, refused):
    gpu(*sm)
    assert best_format(CUDA) == best
    reasons = {name: reason for name in FORMATS if (reason := format_of(name).refuses(CUDA))}
    assert set(reasons) == refused
    assert all("compute capability" in reason for reason in reasons.values())


def test_the_cpu_can_all_and_takes_none_by_itself():
    assert best_format(CPU) is None
    assert not any(format_of(name).refuses(CPU) for name in FORMATS)


@pytest.mark.parametrize(
    ("outputs", "inputs", "how"),
    [
        (9216, 3072, "rowwise"),  # FLUX qkv
        (13824, 5120, "tensorwise"),  # Wan mlp up
        (5120, 13824, "rowwise, exact accumulation"),  # Wan mlp down
        (1280, 1280, "rowwise"),  # SDXL
        (1280, 2048, None),  # its text keys
        (640, 640, None),
    ],
)
def test_rows_of_an_h200(gpu, outputs, inputs, how):
    gpu(9, 0)
    rule = rule_for(outputs=outputs, inputs=inputs, format=format_of("fp8"), device=CUDA)
    assert (rule.how if rule else None) == how


def test_other_gpus_share_the_general_rows_only(gpu):
    gpu(8, 9)
    assert rule_for(outputs=13824, inputs=5120, format=format_of("fp8"), device=CUDA).how == "rowwise"


def test_every_row_can_be_reached(gpu):
    gpu(9, 0)
    for rule in RULES:
        outputs, inputs = rule.shape or (4096, 4096)
        found = rules.rule_for(outputs=outputs, inputs=inputs, format=format_of(rule.format), device=CUDA)
        assert found is rule
