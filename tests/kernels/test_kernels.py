"""Every case of every kernel against its torch reference: compiled on a GPU, interpreted without one."""

import pytest
import torch

from vivace.kernels import KERNELS, row

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CASES = [
    pytest.param(kernel, case, dtype, id=f"{kernel.name}-{case.name}-{short}")
    for kernel in KERNELS.values()
    for case in kernel.cases
    for short, dtype in DTYPES.items()
]


@pytest.fixture(autouse=True)
def _poison():
    # Memory that a kernel forgets to write is NaN, not a right answer left over from the reference.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("kernel", "case", "dtype"), CASES)
def test_matches_reference(kernel, case, dtype):
    expected = kernel.results(kernel.reference, kernel.arguments(case, device=DEVICE, dtype=dtype))
    got = kernel.results(kernel.launch, kernel.arguments(case, device=DEVICE, dtype=dtype))
    assert len(got) == len(expected)
    for e, g in zip(expected, got, strict=True):
        assert (g.shape, g.dtype, g.stride()) == (e.shape, e.dtype, e.stride())
        relative, absolute = kernel.tolerance.get(g.dtype, row.TOLERANCE.get(g.dtype, (0, 0)))
        torch.testing.assert_close(g.float(), e.float(), rtol=relative, atol=absolute, equal_nan=bool(kernel.written))
