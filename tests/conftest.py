"""Pipelines that several tests accelerate, and Triton's interpreter."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline

# Without a GPU the kernels run in the interpreter, which has to be asked for before anything imports Triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def _patch_once(interpreter: ModuleType) -> None:
    """Have Triton's interpreter patch its language once a launch.

    It does so anew at every call of one kernel function by another, which is more than half of what a kernel takes.
    """
    patch, patched = interpreter._patch_lang, set()

    def patch_once(fn: Callable[..., Any]) -> Any:
        named = {id(value) for value in fn.__globals__.values()}
        languages = named & {id(interpreter.tl), id(interpreter.tl.core)}
        if languages <= patched:
            return SimpleNamespace(restore=lambda: None)
        launch = not patched  # nobody restores what the functions that it calls patch
        patched.update(languages)
        scope = patch(fn)
        return SimpleNamespace(restore=lambda: (patched.clear(), scope.restore())) if launch else scope

    interpreter._patch_lang = patch_once


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    _patch_once(importlib.import_module("triton.runtime.interpreter"))


def pytest_collection_finish() -> None:
    """What is imported and collected stays: no collection of garbage, which many tests ask for, has to look at it."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests marked gpu and multi_gpu need what their marks name."""
    there = torch.cuda.device_count()
    for item in items:
        if item.get_closest_marker("gpu") and there < 1:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
        if item.get_closest_marker("multi_gpu") and there < 2:
            item.add_marker(pytest.mark.skip(reason="needs several NVIDIA GPUs"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray cluster of this process's own, on two processors."""
    # Looked for, not imported: Ray has to be told first what it is for.
    if importlib.util.find_spec("ray") is None:
        pytest.skip("needs the extra [ray]")
    from vivace.cluster.connect import connect

    with connect(cpus=2, store_bytes=100 * 2**20):
        yield


@pytest.fixture
def mortal(tmp_path: Path) -> Callable[..., Callable[..., Any]]:
    """Makes workers of which one is lost: `mortal(make, chosen=...)` makes what `make` makes, whose process is killed
    once, when it has done a task that is `chosen` and has told nobody; `mortal.killed()` says whether that was.
    """
    mark = tmp_path / "killed"

    def wrap(make: Callable[..., Callable[[Any], Any]], *, chosen: Callable[[Any], bool]) -> Callable[..., Any]:
        def made(*given: Any) -> Callable[[Any], Any]:
            go = make(*given)

            def do(task: Any) -> Any:
                result = go(task)
                if chosen(task) and not mark.exists():
                    mark.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return do

        return made

    wrap.killed = mark.exists
    return wrap


def _stand_in(until: ExitStack) -> None:
    from vivace.kernels import KERNELS

    library = until.enter_context(torch.library._scoped_library("vivace", "IMPL", "CPU"))
    with warnings.catch_warnings(action="ignore"):
        for kernel in KERNELS.values():
            library.impl(kernel.name, kernel.reference, allow_override=True)


@pytest.fixture(scope="session", autouse=True)
def _references() -> Iterator[ExitStack]:
    """Kernels' references in their stead, which is what runs on any CPU without the interpreter, and much sooner.

    What is about kernels is `interpreted`: all of kernels/ and fused/, and single tests elsewhere.
    """
    with ExitStack() as until:
        _stand_in(until)
        yield until


@pytest.fixture
def interpreted(_references: ExitStack) -> Iterator[None]:
    """The kernels themselves, in Triton's interpreter where there is no GPU."""
    _references.close()
    yield
    _stand_in(_references)


@pytest.fixture
def young() -> None:
    """`gc` counts and collects only what is made from now on: everything else that a process of tests holds takes
    seconds each time.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def emulated_fp8(monkeypatch: pytest.MonkeyPatch) -> Callable[..., torch.Tensor]:
    """cuDNN's fp8 attention, in its own place, written out in torch: softmax's numerators in e4m3, sums in fp32."""
    from vivace.attention import cudnn_fp8

    def run(call: cudnn_fp8.Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, descale=None) -> torch.Tensor:
        e4m3, factor = torch.float8_e4m3fn, cudnn_fp8.PROBABILITIES
        assert {t.dtype for t in (q, k, v)} == {e4m3}
        wide = [t.float().transpose(1, 2) for t in (q, k, v)]
        logits = wide[0] @ wide[1].transpose(-1, -2) * call.scale * (1 if descale is None else descale)
        numerators = (logits - logits.amax(-1, keepdim=True)).exp()
        stored = (numerators * factor).to(e4m3).float() / factor
        return (stored @ wide[2] / numerators.sum(-1, keepdim=True)).transpose(1, 2).to(e4m3).contiguous()

    monkeypatch.setattr(cudnn_fp8, "_run", run)
    return run


@pytest.fixture
def machine(cluster: None) -> Iterator[SimpleNamespace]:
    """A second machine of the cluster, so far as Ray knows, with one processor; `lose` takes it away at once."""
    import ray
    from ray.cluster_utils import Cluster

    there = Cluster()
    there.head_node = SimpleNamespace(gcs_address=ray.get_runtime_context().gcs_address)
    there.redis_address = there.head_node.gcs_address
    before = {node["NodeID"] for node in ray.nodes()}
    node = there.add_node(wait=False, num_cpus=1, node_ip_address="127.0.0.1", object_store_memory=100 * 2**20)
    found = []
    while not found:
        found = [one["NodeID"] for one in ray.nodes() if one["NodeID"] not in before and one["Alive"]]
        time.sleep(0.1)
    yield SimpleNamespace(id=found[0], lose=partial(there.remove_node, node, allow_graceful=False))
    if node in there.worker_nodes:
        there.remove_node(node, allow_graceful=False)


@pytest.fixture
def sd3_pipe() -> StableDiffusion3Pipeline:
    """A random Stable Diffusion 3 without VAE and text encoders; `sd3_latents` calls it."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=16,
        pooled_projection_dim=20,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    ).eval()
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    absent = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    pipe = StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **dict.fromkeys(absent)
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def sd3_latents() -> Callable[..., torch.Tensor]:
    """Calls such a pipeline: three guided steps, the same noise and text each time."""

    def latents(pipe: StableDiffusion3Pipeline, *, size: int = 64, **arguments) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        dtype = next(pipe.transformer.parameters()).dtype
        text = torch.randn(2, 23, 24, generator=generator).to(dtype)
        text[:, 7:] = 0
        pooled = torch.randn(2, 20, generator=generator).to(dtype)
        return pipe(
            **{"prompt_embeds": text[:1], "negative_prompt_embeds": text[1:]},
            **{"pooled_prompt_embeds": pooled[:1], "negative_pooled_prompt_embeds": pooled[1:]},
            **{"height": size, "width": size, "generator": generator, "output_type": "latent"},
            **{"num_inference_steps": 3, **arguments},
        ).images

    return latents


@pytest.fixture(scope="session")
def unet_pipe() -> StableDiffusionPipeline:
    """A tiny Stable Diffusion, which every test leaves as it found it."""
    from vivace.families import FAMILIES

    pipe = FAMILIES["sd"].tiny()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def lora_of() -> Callable[..., dict[str, torch.Tensor]]:
    """Makes random factors for every linear of a module whose name contains `within`, as PEFT names them."""

    def factors(
        module: torch.nn.Module,
        *,
        prefix: str = "transformer",
        within: str = "blocks",
        rank: int = 4,
        seed: int = 1,
        std: float = 0.2,
    ) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        made = {}
        for name, linear in module.named_modules():
            if isinstance(linear, torch.nn.Linear) and within in name:
                key = f"{prefix}.{name.replace('.base_layer', '')}"
                made[f"{key}.lora_A.weight"] = torch.randn(rank, linear.in_features, generator=generator) * std
                made[f"{key}.lora_B.weight"] = torch.randn(linear.out_features, rank, generator=generator) * std
        return made

    return factors
