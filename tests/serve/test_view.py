"""A request's view of a pipeline: what it may use of the others', and what it must not keep alive."""

import gc
import weakref

import pytest
import torch
from PIL import ImageChops

from vivace.accelerate import acceleration_of
from vivace.families import FAMILIES
from vivace.host_times import Times
from vivace.one_off import stock_class
from vivace.prompts import Prompts
from vivace.serve.engine import Engine
from vivace.serve.model import Spec
from vivace.serve.request import Request


@pytest.fixture
def kept(engine, pipe):
    """The counts of the pipeline's memory of prompts."""
    return lambda: memory_of(pipe).to_dict()


def memory_of(pipe) -> Prompts:
    acceleration = acceleration_of(pipe)
    assert acceleration is not None
    assert acceleration.target.prompts is not None
    return acceleration.target.prompts


def test_a_prompt_is_encoded_once_for_all_who_ask_with_it(engine, order, kept):
    engine.submit(order(seed=1)).result(60)
    assert (kept()["computed"], kept()["hits"], kept()["passed"]) == (1, 0, 0)
    again = engine.submit(order(seed=2)).result(60)
    engine.submit(order(seed=2, prompt="a blue ring")).result(60)
    assert (kept()["computed"], kept()["hits"], kept()["passed"]) == (2, 1, 0)
    assert again.pictures[0].tobytes() == engine.submit(order(seed=2)).result(60).pictures[0].tobytes()


def test_the_device_is_looked_up_once_for_a_mode(engine, pipe, order, monkeypatch):
    """Stock looks through every module of every part for hooks, several times a picture."""
    asked, stock = [], stock_class(type(pipe))._execution_device.fget
    monkeypatch.setattr(stock_class(type(pipe)), "_execution_device", property(lambda p: asked.append(p) or stock(p)))
    counts = []
    for quality in ("exact", "exact", "balanced", "balanced"):
        engine.submit(order(quality=quality)).result(60)
        counts.append(len(asked))
    assert counts[0] == counts[1] > 0
    assert counts[2] == counts[3] > counts[1]


def test_a_deterministic_request_takes_nothing_that_others_computed(engine, order, kept):
    for _ in range(2):
        engine.submit(order(deterministic=True)).result(60)
    assert kept() == {"hits": 0, "computed": 0, "passed": 0, "bytes": 0}


@pytest.mark.parametrize("scheduler", [None, "euler"])
def test_steps_count_also_where_a_scheduler_is_named(engine, order, scheduler, monkeypatch):
    found, stock = [], Times.find
    monkeypatch.setattr(Times, "find", lambda times, step: found.append(stock(times, step)) or found[-1])
    job = engine.submit(order(steps=6, scheduler=scheduler, cache="steps:compute=0-1+4", preview_every=2))
    assert job.result(60).calls == engine.submit(order(steps=6, cache="steps:compute=0-1+4")).result(60).calls
    assert job.result().calls["skipped"] > 0
    # A step that asks the device where it stands would wait for everybody's calls.
    assert found
    assert None not in found


def test_what_a_former_preset_kept_of_the_prompts_is_gone(engine, pipe, order):
    engine.submit(order(quality="exact", steps=1)).result(60)
    kept = weakref.ref(memory_of(pipe))
    engine.submit(order(quality="balanced", steps=1)).result(60)
    gc.collect()
    assert kept() is None


def test_what_a_pipeline_set_in_its_scheduler_holds_for_requests_too():
    """Stable Diffusion's sets an offset that nobody gave the scheduler: other steps are other pictures."""
    pipe = FAMILIES["sd"].tiny()
    pipe.set_progress_bar_config(disable=True)
    assert pipe.scheduler.config.steps_offset == 1
    asked = Request(prompt="a red circle", size=(64, 64), steps=2, seed=0, deterministic=True)
    noise = torch.Generator("cpu").manual_seed(0)
    picture = pipe(asked.prompt, width=64, height=64, num_inference_steps=2, generator=noise).images[0]
    with Engine(models={"model": Spec(source=pipe, preset="exact")}) as engine:
        served = engine.submit(asked).result(60).pictures[0]
    apart = ImageChops.difference(picture.convert("RGB"), served.convert("RGB"))
    assert max(high for _, high in apart.getextrema()) <= 1
