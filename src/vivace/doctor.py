"""What works on this machine: dtypes, attention, Triton, our kernels, optional packages; each one tried."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from vivace.errors import InputError, install
from vivace.machine import installed, machine

if TYPE_CHECKING:
    import torch
    from rich.console import RenderableType

PROBE_SECONDS = 300


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was tried, and what came of it."""

    group: str  # a heading of the table
    name: str
    works: bool
    detail: str = ""  # the version, the reason it failed, or what to install


@dataclass(frozen=True, kw_only=True)
class Package:
    """An optional package: what it is for and how to get it."""

    distribution: str
    module: str
    gives: str
    extra: str = ""  # of this project's, where it comes with one


PACKAGES = (
    Package(distribution="triton", module="triton", gives="GPU kernels"),
    Package(distribution="av", module="av", gives="mp4 files", extra="video"),
    Package(distribution="textual-image", module="textual_image", gives="--show", extra="ui"),
    Package(distribution="nvidia-cudnn-frontend", module="cudnn", gives="fp8 attention", extra="quant"),
    Package(distribution="torchao", module="torchao", gives="a peer in benchmarks: quantised linears", extra="bench"),
    Package(distribution="cache-dit", module="cache_dit", gives="a peer in benchmarks: step caching", extra="bench"),
)


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """All checks of one machine; rich prints it as a table."""

    machine: dict[str, Any]
    checks: tuple[Check, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.markup import escape
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        for heading in ("", "what", "works", "detail"):
            table.add_column(heading, overflow="fold")
        group = ""
        for check in self.checks:
            heading = "" if check.group == group else f"[bold]{check.group}[/]"
            group = check.group
            table.add_row(heading, check.name, "[green]yes[/]" if check.works else "[red]no[/]", escape(check.detail))
        return Group(*(escape(line) for line in _headlines(self.machine)), "", table)


def examine() -> Diagnosis:
    """Tries everything on the first GPU, or on the CPU where there is none. Takes seconds; raises nothing."""
    checks = (*_dtypes(), *_attention(), *_triton(), *_packages())
    return Diagnosis(machine=machine(), checks=checks)


def _headlines(facts: dict[str, Any]) -> Iterator[str]:
    yield ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    memory = f", {facts['memory_bytes'] / 2**30:.0f} GiB" if facts["memory_bytes"] else ""
    yield f"{facts['system']}, Python {facts['python']}, {facts['cores']} cores of {facts['processor']}{memory}"
    for card in facts["gpus"]:
        yield (
            f"{card['name']}, compute capability {card['capability']}, {card['memory_bytes'] / 2**30:.0f} GiB, "
            f"CUDA {facts['cuda']}, cuDNN {facts['cudnn']}"
        )
    if not facts["gpus"]:
        yield "no GPU that torch can use: everything below was tried on the CPU"


def _tried(group: str, name: str, attempt: Callable[[], str | None]) -> Check:
    try:
        return Check(group=group, name=name, works=True, detail=attempt() or "")
    except InputError as error:  # already says what to do
        return Check(group=group, name=name, works=False, detail=str(error))
    except Exception as error:  # the point of a check: whatever goes wrong is its result
        lines = str(error).strip().splitlines() or [""]
        return Check(group=group, name=name, works=False, detail=f"{type(error).__name__}: {lines[0]}")


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _close(out: torch.Tensor, exact: torch.Tensor, *, within: float) -> None:
    error = ((out.double() - exact).norm() / exact.norm()).item()
    if not error <= within:  # also when NaN
        raise ArithmeticError(f"the result is wrong: relative error {error:.3g}, allowed {within:.3g}")


def _dtypes() -> Iterator[Check]:
    import torch

    generator = torch.Generator().manual_seed(0)
    # 256 wide: every low-precision GEMM asks for multiples of 16, and these are the smallest shapes all of them take.
    a, b = (torch.randn(256, 256, generator=generator).to(_device()) for _ in range(2))
    exact = a.double() @ b.double()

    def plain(dtype: torch.dtype, within: float) -> None:
        _close(a.to(dtype) @ b.to(dtype), exact, within=within)

    def fp8(row_scales: bool) -> None:
        ones = torch.ones((256, 1) if row_scales else (), device=a.device)
        fp8_a, fp8_b = a.to(torch.float8_e4m3fn), b.t().contiguous().to(torch.float8_e4m3fn).t()
        out = torch._scaled_mm(
            fp8_a, fp8_b, scale_a=ones, scale_b=ones.t() if row_scales else ones, out_dtype=torch.bfloat16
        )
        _close(out, exact, within=0.06)

    def int8() -> None:
        int_a, int_b = ((x * 30).round().clamp(-127, 127).to(torch.int8) for x in (a, b))
        out = torch._int_mm(int_a, int_b)
        _close(out, int_a.double() @ int_b.double(), within=0)

    yield _tried("dtypes", "fp32 matmul", lambda: plain(torch.float32, 1e-2))  # TF32 may be on
    yield _tried("dtypes", "bf16 matmul", lambda: plain(torch.bfloat16, 1e-2))
    yield _tried("dtypes", "fp16 matmul", lambda: plain(torch.float16, 2e-3))
    yield _tried("dtypes", "fp8 e4m3 matmul, one scale", lambda: fp8(row_scales=False))
    yield _tried("dtypes", "fp8 e4m3 matmul, row scales", lambda: fp8(row_scales=True))
    yield _tried("dtypes", "int8 matmul", int8)


def _attention() -> Iterator[Check]:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 128, 64, generator=generator).to(_device()) for _ in range(3))  # [B, H, S, D]
    exact = (q.double() @ k.double().mT * 64**-0.5).softmax(-1) @ v.double()

    def attend(backend: SDPBackend) -> None:
        import warnings

        with sdpa_kernel(backend), warnings.catch_warnings(record=True) as reasons:
            warnings.simplefilter("always")
            try:
                out = scaled_dot_product_attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
            except RuntimeError as error:  # torch says why in warnings, and in the error only that
                said = [line for w in reasons if "Triggered internally" in (line := str(w.message))]
                only = "torch has it for GPUs only" if q.device.type == "cpu" else str(error)
                why = said[-1].partition("(Triggered internally")[0].strip() if said else only
                raise RuntimeError(why) from error
        _close(out, exact, within=2e-2)

    for name in ("MATH", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"):
        backend = getattr(SDPBackend, name)
        yield _tried("attention", f"SDPA {name.removesuffix('_ATTENTION').lower()}, bf16", lambda b=backend: attend(b))
    yield from _backends(q, k, v, exact)


def _backends(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, exact: torch.Tensor) -> Iterator[Check]:
    """What `Config(attention=...)` may name; q, k, v and `exact` are [B, H, S, D]."""
    import torch

    from vivace.attention import BACKENDS, backend_of

    def attend(name: str) -> None:
        chosen = backend_of(name)
        if reason := chosen.refuses(device=q.device, dtype=torch.bfloat16):
            raise InputError(reason)
        out = chosen.attend(*(x.bfloat16().transpose(1, 2).contiguous() for x in (q, k, v)))
        _close(out.transpose(1, 2), exact, within=5e-2)  # wide enough for 8-bit attention

    for name in BACKENDS:
        yield _tried("attention", f'attention="{name}"', lambda name=name: attend(name))


def _triton() -> Iterator[Check]:
    """The checks that `vivace.probe` prints, from a process of its own: compiled on a GPU, else interpreted."""
    group = "triton, compiled" if _device() == "cuda" else "triton, interpreted"
    if not installed("triton"):
        yield Check(group=group, name="a tiny kernel", works=False, detail="pip install -c constraints.txt triton")
        return
    environment = os.environ | ({} if _device() == "cuda" else {"TRITON_INTERPRET": "1"})
    command = [sys.executable, "-m", "vivace.probe"]
    try:
        probe = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        yield Check(group=group, name="kernels", works=False, detail=f"not finished in {PROBE_SECONDS} s")
        return
    for line in probe.stdout.splitlines():
        if line.startswith("{"):
            yield Check(group=group, **json.loads(line))
    if probe.returncode:
        last = (probe.stderr.strip().splitlines() or ["no message"])[-1]
        yield Check(group=group, name="the process", works=False, detail=f"exit code {probe.returncode}: {last}")


def _packages() -> Iterator[Check]:
    for package in PACKAGES:
        name = f"{package.distribution} ({package.gives})"
        version = installed(package.distribution)
        if version is None:
            alone = f"pip install -c constraints.txt {package.distribution}"
            how = install(package.extra) if package.extra else alone
            yield Check(group="packages", name=name, works=False, detail=how)
            continue

        def imports(module: str = package.module, version: str = version) -> str:
            importlib.import_module(module)
            return version

        yield _tried("packages", name, imports)
