"""Step caches behind the engine: each request's own, and what they skip is in nobody's batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from vivace.config import Config
from vivace.families import FAMILIES
from vivace.serve import Engine, Spec
from vivace.serve.failures import FieldError
from vivace.serve.gather import Gather

SEGMENTS = {"firstblock": ("front", "rest"), "deepcache": ("front", "blocks", "back")}


def patient() -> Gather:
    """Waits long enough that who can meet does, on a slow machine too."""
    return Gather(share=100.0, longest=0.2)


@pytest.fixture(scope="module")
def asked(requests):
    """Makes requests of seven to nine steps."""
    return lambda *what, **fields: [replace(one, steps=one.steps + 5) for one in requests(*what, **fields)]


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
    # Not its segments, of which each is a call of the worker's.
    assert found.calls["computed"] <= found.calls["denoiser"] <= 8


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


SLOW = {"svd": pytest.mark.full}  # a video model, most of whose time goes into its VAE


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW.get(name, ())) for name in FAMILIES])
def test_between_the_blocks_too_requests_share_calls(name, asked, pixels):
    family = FAMILIES[name]
    cache = "deepcache:interval=2" if "up_blocks" in family.blocks else "firstblock:threshold=9,max_skips=1"
    # In double precision a wrong row shows and the order of sums does not.
    pipe = family.tiny().to(torch.float64)
    sizes: dict[str, int] = {}

    def count(batch):
        segment = batch.kind.partition(".")[2].partition(" ")[0]
        sizes[segment] = max(batch.size, sizes.get(segment, 0))

    # PixArt's fused blocks group the rows by the length of their texts: such states go alone.
    preset = Config(fuse="off") if name == "pixart" else "exact"
    with Engine(models={"tiny": Spec(source=pipe, preset=preset)}, gather=patient) as engine:
        alone = [engine.submit(one).result(120) for one in asked(family, pipe, cache=cache, deterministic=True)]
        engine.observe(batch=count, job=lambda job: None)
        for _ in range(5):  # that they meet is likely, not certain
            jobs = [engine.submit(one) for one in asked(family, pipe, cache=cache)]
            together = [job.result(120) for job in jobs]
            if min(sizes[segment] for segment in SEGMENTS[cache.partition(":")[0]]) > 1:
                break
    assert min(sizes[segment] for segment in SEGMENTS[cache.partition(":")[0]]) > 1, sizes
    for one, other in zip(alone, together, strict=True):
        assert {**one.calls, "requests_per_call": 0} == {**other.calls, "requests_per_call": 0}
        assert one.calls["skipped"] > 0
        for mine, theirs in zip(one.pictures, other.pictures, strict=True):
            assert np.abs(pixels(mine) - pixels(theirs)).max() <= 1


@pytest.mark.parametrize(
    "cache",
    [
        "dicache:threshold=0.3,retain=0.2",
        "blockdance:begin=0.2,after=1",
        "teacache:threshold=0.3,coefficients=1+0",
        "taylorseer:interval=2",
        "guidance:every=2,warmup=1",
        "pab:warmup=1,cooldown=1",
        "steps:compute=0-1+4+7",
    ],
)
def test_every_policy_is_each_requests_own(cache, pixels, order):
    pipe = FAMILIES["sd3"].tiny().to(torch.float64)
    quality = Config(fuse="off") if cache.startswith("pab") else "exact"
    with Engine(models={"tiny": Spec(source=pipe, preset=quality)}, gather=patient) as engine:
        ask = [order(seed=seed, steps=6 + seed, cache=cache) for seed in range(1, 4)]
        alone = [engine.submit(replace(one, deterministic=True)).result(120) for one in ask]
        for _ in range(5):
            together = [job.result(120) for job in [engine.submit(one) for one in ask]]
            if cache.startswith("pab") or max(result.calls["requests_per_call"] for result in together) > 1:
                break
    assert cache.startswith("pab") or max(result.calls["requests_per_call"] for result in together) > 1
    for one, other in zip(alone, together, strict=True):
        assert one.calls["skipped"] == other.calls["skipped"] > 0
        assert np.abs(pixels(one.pictures[0]) - pixels(other.pictures[0])).max() <= 1


def test_alone_a_block_cache_has_the_same_bits_as_before_it_met_others(engine, order):
    cache = "firstblock:threshold=0.3,max_skips=1"
    first = engine.submit(order(steps=8, cache=cache, deterministic=True)).result(60)
    jobs = [engine.submit(order(seed=seed, steps=8, cache=cache)) for seed in range(4)]
    jobs.insert(2, engine.submit(order(steps=8, cache=cache, deterministic=True)))
    among = [job.result(60) for job in jobs][2]
    assert among.calls["requests_per_call"] == 1
    assert among.pictures[0].tobytes() == first.pictures[0].tobytes()


def test_exact_is_not_degraded_by_cached_neighbours(engine, order):
    exact = engine.submit(order(steps=8, deterministic=True)).result(60)
    jobs = [engine.submit(order(seed=s, steps=8, cache="steps:compute=0+7")) for s in range(3)]
    among = engine.submit(order(steps=8, quality="exact", deterministic=True))
    jobs += [engine.submit(order(seed=s, steps=8, cache="steps:compute=0+7")) for s in range(3)]
    assert among.result(60).pictures[0].tobytes() == exact.pictures[0].tobytes()
    assert all(job.result(60).calls["skipped"] == 6 for job in jobs)
    assert "skipped" not in among.result().calls


@pytest.mark.parametrize(
    "cache", ["no-such", "steps:compute=0-99999999999", "teacache:x=1", "/etc/cache.yaml", "plan.yml", "planned:file=x"]
)
def test_wrong_caches_are_refused_and_no_file_is_read(engine, order, cache):
    with pytest.raises(FieldError) as error:
        engine.submit(order(cache=cache))
    assert error.value.field == "cache"


def test_a_cache_that_the_model_cannot_have_is_that_fields_error(engine, order):
    with pytest.raises(FieldError, match="cache='planned' cannot be done here: no calibration") as error:
        engine.submit(order(cache="planned")).result(60)
    assert error.value.field == "cache"
    assert engine.submit(order()).result(60).effective["preset"] == "exact"
