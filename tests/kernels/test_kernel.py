"""The ops as models and torch.compile see them, and machines without Triton."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from vivace.kernels import KERNELS, language, row
from vivace.kernels.kernel import Case
from vivace.kernels.norm_modulate import norm_modulate
from vivace.kernels.qk_norm_rope import qk_norm_rope
from vivace.kernels.quant_rows import quant_rows
from vivace.kernels.residual_norm import residual_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EVERY = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)


@EVERY
def test_torch_library_accepts_it(kernel):
    for case in (kernel.cases[0], kernel.cases[-1]):
        arguments = kernel.arguments(case, device=DEVICE, dtype=torch.float32)
        arguments |= {name: torch.zeros_like(arguments[name]) for name in kernel.written if arguments[name] is not None}
        # The schema's test compares inputs by sums, which torch does not have for fp8.
        fp8 = any(a.dtype == torch.float8_e4m3fn for a in arguments.values() if isinstance(a, torch.Tensor))
        utils = ("test_faketensor",) if fp8 else ("test_schema", "test_faketensor")
        torch.library.opcheck(kernel.op, (), arguments, test_utils=utils)


def test_compile_takes_it_whole():
    def block(x, y, gate):
        h, normed = residual_norm(x, y, gate=gate)
        q, k = torch.empty(2, 2, x.shape[0], x.shape[1], 2, 32, device=x.device).unbind(0)[0]
        qk_norm_rope(normed, q=q, k=k)
        return h, q + k

    arguments = (
        torch.randn(2, 5, 192, device=DEVICE),
        torch.randn(2, 5, 192, device=DEVICE),
        torch.randn(2, 192, device=DEVICE),
    )
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*arguments), block(*arguments))


@pytest.mark.skipif(not language.INTERPRETED, reason="without Triton's interpreter")
def test_the_interpreter_patches_its_language_once_a_launch(monkeypatch):
    """Else these tests take twice as long."""
    from triton.runtime import interpreter

    changed, change = [], interpreter._LangPatchScope.set_attr
    monkeypatch.setattr(interpreter._LangPatchScope, "set_attr", lambda *a: (changed.append(a[1:3]), change(*a)))
    program = interpreter.tl.program_id
    counts = []
    for rows in (1, 1, 50):  # the process's first patches for good what functions of Triton's own read
        norm_modulate(torch.randn(rows, 64))
        counts.append(len(changed))
        changed.clear()
        assert interpreter.tl.program_id is program, "it stays patched"
    assert counts[1] == counts[2] > 0


def test_leading_dimensions_are_kept():
    x = torch.randn(6, 64, device=DEVICE)
    assert norm_modulate(x).shape == (6, 64)
    rows = quant_rows(x, quantize="int8")
    assert (rows.values.shape, rows.scales.shape, rows.values.dtype) == ((6, 64), (6, 2), torch.int8)
    assert (rows.dense() - x).abs().max() <= rows.scales[:, 0].max() / 2 * 1.001


def test_rows_must_be_contiguous():
    with pytest.raises(ValueError, match="x must be contiguous in its last dimension"):
        norm_modulate(torch.randn(2, 64, 5, device=DEVICE).mT)


def test_what_does_not_fit():
    q = torch.empty(1, 8, 2, 32)
    with pytest.raises(ValueError, match="at offset 5 does not fit"):
        qk_norm_rope(torch.randn(1, 4, 192), q=q, k=q, offset=5)

    with pytest.raises(ValueError, match=r"cos must be \[4, 16\]"):
        qk_norm_rope(torch.randn(1, 4, 192), q=q, k=q, cos=torch.ones(4, 32), sin=torch.ones(4, 32))
    with pytest.raises(ValueError, match=r"scale must be \[2, 64\]"):
        norm_modulate(torch.randn(2, 3, 64), scale=torch.ones(1, 64))
    with pytest.raises(ValueError, match="must have the same shape"):
        residual_norm(torch.randn(2, 3, 64), torch.randn(1, 3, 64))


@pytest.mark.parametrize("name", ["norm_modulate", "gate_residual", "residual_norm", "activate", "glu", "quant_rows"])
def test_more_than_two_billion_elements_apart(name):
    # Address space, not memory: only the pages of three rows are touched.
    memory = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=DEVICE)
    kernel = KERNELS[name]
    case = Case("far", {"tokens": 3, "width": 64} | ({"quantize": "int8"} if name == "quant_rows" else {}))
    arguments = kernel.arguments(case, device=DEVICE)
    first = next(iter(arguments))
    far = memory.as_strided((1, 3, 64), (0, 2**30, 1)).copy_(arguments[first])
    for got, expected in zip(kernel.launch(**arguments | {first: far}), kernel.launch(**arguments), strict=True):
        assert torch.equal(got, expected)


def test_one_sample_does_not_change_another():
    x = torch.randn(2, 5, 64, device=DEVICE)
    alone = quant_rows(x[:1], quantize="int8")
    together = quant_rows(torch.cat((x[:1], 100 * x[1:])), quantize="int8")
    assert torch.equal(alone.values, together.values[:1])
    assert torch.equal(alone.scales, together.scales[:1])


@EVERY
def test_bench_cases_have_a_bound(kernel):
    for case in kernel.bench:
        subject = next(iter(kernel.arguments(case, device="meta").values()))
        assert kernel.bound_bytes(case) > 2 * min(subject.shape)


def test_bound_counts_each_tensor_once():
    case = next(c for c in KERNELS["gate_residual"].bench if c.name == "FLUX 1024²")
    assert KERNELS["gate_residual"].bound_bytes(case) == 2 * 3072 * (3 * 4608 + 1)


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        *((72, (8, 128, 1)), (192, (4, 256, 1)), (640, (1, 1024, 1)), (1280, (1, 2048, 1)), (1536, (1, 2048, 2))),
        *((3072, (1, 4096, 4)), (12288, (1, 16384, 16)), (30000, (1, 32768, 16))),
    ],
)
def test_a_tile_of_whole_rows_has_few_warps_that_wait_for_one_another(width, expected):
    assert row.tile(width) == expected


@pytest.mark.parametrize(
    ("width", "expected"),
    [(640, (16, 128, 2)), (1280, (16, 256, 4)), (2560, (8, 512, 4)), (3072, (4, 1024, 4)), (48, (16, 64, 1))],
)
def test_a_tile_of_columns_leaves_few_beyond_the_width(width, expected):
    assert row.part(width) == expected


def test_without_triton():
    code = """
import sys; sys.modules["triton"] = None
import torch
from vivace.kernels import KERNELS
from vivace.kernels.norm_modulate import _norm_modulate_kernel, norm_modulate
x = torch.randn(2, 3, 64)
torch.testing.assert_close(norm_modulate(x), torch.nn.functional.layer_norm(x, (64,), eps=1e-6))
try: _norm_modulate_kernel[(1,)]
except RuntimeError as error: print(len(KERNELS), error)
"""
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert (
        said.strip()
        == f"{len(KERNELS)} _norm_modulate_kernel is a Triton kernel and Triton is not installed; pip install triton"
    )


@pytest.mark.parametrize(("n", "power"), [(1, 1), (2, 2), (3, 4), (24, 32), (3072, 4096)])
def test_power_of_two(n, power):
    assert language.power_of_two(n) == power


@pytest.mark.skipif(not language.INTERPRETED, reason="threads share nothing but the interpreter")
def test_two_threads_may_launch_at_once():
    kernel = KERNELS["residual_norm"]
    arguments = kernel.arguments(kernel.cases[0], device="cpu", dtype=torch.float32)
    alone = kernel.op(**arguments)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as pool:
            together = list(pool.map(lambda _: kernel.op(**arguments), range(20)))
    finally:
        sys.setswitchinterval(before)
    assert all(torch.equal(a, b) for made in together for a, b in zip(made, alone, strict=True))
