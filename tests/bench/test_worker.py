"""One contestant in this process: times, cold start, memory, error against the reference."""

import pytest
import torch

from vivace import InputError
from vivace.bench.contestant import PEERS, REFERENCE, Contestant, contestants_of
from vivace.bench.worker import run
from vivace.bench.workload import workload_of
from vivace.families import FAMILIES

EXACT = Contestant(name="exact", ours=True)


@pytest.fixture
def quick(monkeypatch):
    """Few samples: what is tested is not the time."""
    from vivace.bench import clock

    monkeypatch.setattr(clock, "SECONDS", 0.01)


def test_a_16_bit_run_beside_its_reference(quick, tmp_path):
    workload = workload_of("sd3:3.5-medium", device="cpu", dtype="bfloat16", tiny=True)
    path = tmp_path / "reference.safetensors"
    assert run(workload, Contestant(name="eager"), reference=path)["error"] is None
    assert run(workload, Contestant(name=REFERENCE), reference=path)["status"] == "done"
    eager = run(workload, Contestant(name="eager"), reference=path)
    exact = run(workload, EXACT, reference=path)
    assert 1e-4 < eager["error"] < 0.1
    assert 1e-4 < exact["error"] < 2 * eager["error"]
    assert exact["report"]["calls"]["denoiser"].keys() == {"fused blocks"}
    for result in (eager, exact):
        assert 0 < result["median_ms"] < 60_000
        assert result["quartiles_ms"][0] <= result["median_ms"] <= result["quartiles_ms"][1]
        assert len(result["samples_ms"]) >= 7
        assert result["cold_seconds"] >= result["prepare_seconds"] >= 0
        assert result["peak_bytes"] > 0
        assert result["tflop"] > 0


def test_end_to_end_draws_the_same_picture(quick, tmp_path):
    workload = workload_of("flux", device="cpu", dtype="float32", tiny=True, end_to_end=True)
    path = tmp_path / "reference.safetensors"
    run(workload, Contestant(name=REFERENCE), reference=path)
    exact = run(workload, EXACT, reference=path)
    assert exact["error"] < 1e-3
    assert exact["tflop"] is None
    assert exact["report"]["pipeline"] == "FluxPipeline"


def test_fields_reach_the_config(quick, tmp_path):
    workload = workload_of("sd3", device="cpu", dtype="float32", tiny=True)
    stock = Contestant(name="exact", ours=True, fields=("fuse=off",))
    result = run(workload, stock, reference=tmp_path / "none")
    assert result["report"]["calls"]["denoiser"].keys() == {"stock blocks"}
    assert stock.label == "vivace exact fuse=off"


def test_what_a_peer_does_not_offer_says_so(tmp_path):
    forward = workload_of("sd3", device="cpu", dtype="float32", tiny=True)
    with pytest.raises(InputError, match="add --end-to-end"):
        run(forward, Contestant(name="cache-dit"), reference=tmp_path / "none")
    with pytest.raises(InputError, match="not offered by SD3Transformer2DModel"):
        run(forward, Contestant(name="compile"), reference=tmp_path / "none")


def test_ours_come_first_and_the_slow_starters_last():
    found = contestants_of(presets=["exact"], fields=["graphs=off"], peers=["compile-full", "compile", "eager"])
    assert [one.label for one in found] == ["vivace exact graphs=off", "eager", "compile", "compile-full"]
    own = contestants_of(presets=["fast", "fast keep_base=no"], fields=["graphs=off"], peers=[])
    assert [one.label for one in own] == ["vivace fast graphs=off", "vivace fast graphs=off keep_base=no"]
    for wrong in (
        {"presets": ["fats"]},
        {"presets": ["fast keep_base=never"]},
        {"presets": ["fast keep_base"]},
        {"peers": ["eager", "tensorrt"]},
        {"fields": ["graphs=never"]},
    ):
        with pytest.raises(InputError):
            contestants_of(**{"presets": ["exact"], "fields": [], "peers": [], **wrong})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="device events and device memory")
def test_on_a_gpu(tmp_path):
    workload = workload_of("sd3", device="cuda", dtype="bfloat16", tiny=True)
    path = tmp_path / "reference.safetensors"
    run(workload, Contestant(name=REFERENCE), reference=path)
    result = run(workload, EXACT, reference=path)
    assert result["reserved_bytes"] >= result["peak_bytes"] >= result["weight_bytes"] > 0
    assert 1e-4 < result["error"] < 0.1
    assert 0 < result["median_ms"] < 1000


def test_a_trace_and_the_costliest_operators(quick, tmp_path):
    workload = workload_of("sd3", device="cpu", dtype="float32", tiny=True)
    trace = tmp_path / "trace.json.gz"
    rows = run(workload, EXACT, reference=tmp_path / "none", trace=trace)["profile"]
    assert trace.stat().st_size > 1000
    assert [row["ms"] for row in rows] == sorted((row["ms"] for row in rows), reverse=True)
    assert any("addmm" in row["name"] for row in rows)
    assert 0.5 < sum(row["share"] for row in rows) <= 1.001


def test_a_tiny_pixart_is_timed_end_to_end(tmp_path):
    """Its pipeline's table of shapes has none for it."""
    workload = workload_of("pixart", device="cpu", dtype="float32", tiny=True, end_to_end=True)
    found = run(workload, Contestant(name="eager"), reference=tmp_path / "none")
    assert (found["status"], found["median_ms"] > 0) == ("done", True)


def test_a_video_models_convolutions_get_an_order_where_they_have_one():
    """Those over time have weights of five dimensions, which channels_last does not know."""
    workload = workload_of("svd", device="cpu", dtype="float32", tiny=True)
    denoiser = FAMILIES["svd"].tiny().unet
    assert "channels_last" in PEERS["compile-full"].prepare(denoiser, workload)
    flat = [m.weight for m in denoiser.modules() if isinstance(m, torch.nn.Conv2d)]
    assert flat
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in flat)
