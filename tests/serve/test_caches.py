"""Step caches behind the engine: each request's own, and what they skip is in nobody's batch."""

import numpy as np
import pytest

from vivace.serve.failures import FieldError


@pytest.mark.parametrize(
    "cache", ["steps:compute=0-1+4+7", "teacache:threshold=0.3,coefficients=1+0", "firstblock:threshold=0.3"]
)
def test_alone_a_cached_request_gets_what_the_pipeline_gives(engine, pipe, order, pixels, cache):
    import torch

    import vivace

    found = engine.submit(order(steps=8, cache=cache)).result(60)
    engine.close()
    vivace.accelerate(pipe, "exact", cache=cache)
    generator = torch.Generator("cpu").manual_seed(1)
    own = pipe("a red circle", width=64, height=64, num_inference_steps=8, generator=generator).images[0]
    assert np.abs(pixels(found.pictures[0]) - pixels(own)).max() <= 1
    assert found.calls["computed"] + found.calls["skipped"] == 8
    assert found.calls["skipped"] > 0 or "firstblock" in cache


def test_the_batch_holds_only_what_computes(engine, pipe, order, gated):
    cache = "steps:compute=0-1+4+7"
    alone = [engine.submit(order(seed=s, steps=8, cache=cache, deterministic=True)).result(60) for s in range(4)]
    gate = gated(pipe.transformer)
    jobs = [engine.submit(order(seed=s, steps=8, cache=cache)) for s in range(4)]
    results = [job.result(60) for job in jobs]
    assert all(result.calls["skipped"] == 4 and result.calls["denoiser"] == 4 for result in results)
    assert max(result.calls["requests_per_call"] for result in results) > 1
    assert not gate.sizes  # segments are the lane's: the module itself is not called
    for one, other in zip(alone, results, strict=True):
        distance = np.abs(np.asarray(one.pictures[0]).astype(int) - np.asarray(other.pictures[0]).astype(int))
        assert distance.max() <= 8
        assert distance.mean() < 0.5


def test_exact_is_not_degraded_by_cached_neighbours(engine, order):
    exact = engine.submit(order(steps=8, deterministic=True)).result(60)
    jobs = [engine.submit(order(seed=s, steps=8, cache="steps:compute=0+7")) for s in range(3)]
    among = engine.submit(order(steps=8, quality="exact", deterministic=True))
    jobs += [engine.submit(order(seed=s, steps=8, cache="steps:compute=0+7")) for s in range(3)]
    assert among.result(60).pictures[0].tobytes() == exact.pictures[0].tobytes()
    assert all(job.result(60).calls["skipped"] == 6 for job in jobs)
    assert "skipped" not in among.result().calls


@pytest.mark.parametrize("cache", ["no-such", "teacache:x=1", "/etc/cache.yaml", "plan.yml", "planned:file=x"])
def test_wrong_caches_are_refused_and_no_file_is_read(engine, order, cache):
    with pytest.raises(FieldError) as error:
        engine.submit(order(cache=cache))
    assert error.value.field == "cache"
