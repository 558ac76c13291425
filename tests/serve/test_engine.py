"""The engine: what requests get, in which order, and what one does to another."""

import asyncio
import gc
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Img2ImgPipeline
from PIL import Image

import vivace
from vivace.config import Config
from vivace.errors import InputError
from vivace.families import FAMILIES
from vivace.serve import Engine, Preview, Progress, Request, Spec
from vivace.serve.failures import Cancelled, DeadlineExceeded, FieldError, Unavailable, UnknownModelError

SIDE = 64


def test_the_picture_is_the_pipelines_own(engine, pipe, order, pixels):
    result = engine.submit(order(deterministic=True)).result(60)
    vivace.restore(pipe)
    generator = torch.Generator("cpu").manual_seed(1)
    own = pipe("a red circle", width=SIDE, height=SIDE, num_inference_steps=3, generator=generator).images[0]
    assert np.abs(pixels(result.pictures[0]) - pixels(own)).max() <= 1
    effective = dict(result.effective)
    assert effective == {
        "model": "tiny",
        "preset": "exact",
        "seed": 1,
        "steps": 3,
        "size": [SIDE, SIDE],
        "guidance": 7.0,
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "deterministic": True,
    }
    assert set(result.timings) == {"queue_s", "text_s", "denoise_s", "decode_s", "total_s"}


def test_a_warm_request_takes_a_step_more_and_tells_nothing_of_it(engine, pipe, order, gated, pixels):
    gate = gated(pipe.transformer)
    cold = engine.submit(order(deterministic=True)).result(60)
    before = len(gate.sizes)
    job = engine.submit(order(deterministic=True, warm=True, previews=2))
    warm = job.result(60)
    assert len(gate.sizes) - before == 4
    assert (pixels(warm.pictures[0]) == pixels(cold.pictures[0])).all()
    assert [one.step for one in job.events if isinstance(one, Progress)] == [0, 1, 2, 3]
    assert warm.effective == cold.effective
    assert warm.calls["denoiser"] == cold.calls["denoiser"] == 3
    parts = [warm.timings[name] for name in ("queue_s", "text_s", "denoise_s", "decode_s")]
    assert warm.timings["total_s"] >= sum(parts) - 0.01  # what it was warmed up for is a wait


def test_an_edit_is_warmed_up_with_a_step(engine, pipe, order, gated):
    gate = gated(pipe.transformer)
    picture = Image.new("RGB", (SIDE, SIDE), "red")
    engine.submit(order(images=(picture,), strength=0.4, steps=5, warm=True)).result(60)
    assert len(gate.sizes) == 3


def test_a_cancel_ends_a_warm_up(engine, pipe, order, gated):
    gate = gated(pipe.transformer)
    gate.shut()
    job = engine.submit(order(warm=True))
    assert gate.reached.wait(120)
    job.cancel()
    gate.open.set()
    with pytest.raises(Cancelled):
        job.result(60)
    assert len(gate.sizes) == 1


def test_a_seed_is_drawn_and_told(engine, order):
    one, two = (engine.submit(order(seed=None)).result(60).effective["seed"] for _ in range(2))
    assert one != two
    assert 0 <= one < 2**32


def test_what_decided_the_pixels_is_told(start, order):
    asked = order(negative="a star", true_cfg=3.0)
    told = start(FAMILIES["qwen_image"].tiny()).submit(asked).result(60).effective
    assert (told["negative"], told["true_cfg"], told["steps"]) == ("a star", 3.0, 3)


@pytest.mark.parametrize(("family", "fields"), [("flux", {"negative": "a star"}), ("qwen_image", {"true_cfg": 3.0})])
def test_what_would_change_nothing_is_refused(start, order, family, fields):
    with pytest.raises(FieldError, match="negative prompt") as error:
        start(FAMILIES[family].tiny()).submit(order(**fields))
    assert error.value.field in fields


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": " "}, "prompt"),
        ({"size": (60, 64)}, "size"),
        ({"frames": 5}, "frames"),
        ({"true_cfg": 2.0}, "true_cfg"),
        ({"quality": "best"}, "quality"),
        ({"scheduler": "ddim"}, "scheduler"),
        ({"scheduler": "karrasve"}, "scheduler"),
        ({"images": (Image.new("RGB", (64, 64)),), "strength": 0.01}, "strength"),
        ({"lora": {"style": 1.0}}, "lora"),
        ({"arguments": {"no_such": 1}}, "arguments"),
        ({"model": "other"}, "model"),
    ],
)
def test_wrong_requests_are_refused_at_once(engine, fields, field, order):
    with pytest.raises(FieldError) as error:
        engine.submit(order(**fields))
    assert error.value.field == field
    assert engine.queued == engine.running == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"steps": 2.5}, {"steps": "3"}, {"steps": True}, {"guidance": True}, {"seed": 1.5}, {"prompt": ["a", "b"]},
        {"prompt": None}, {"size": "64x64"},
        {"size": (64,)}, {"size": (64.0, 64)}, {"guidance": "high"}, {"lora": "style"}, {"lora": {"style": "x"}},
        {"images": "x.png"}, {"images": ("x.png",)}, {"mask": "x.png"}, {"scheduler": 5}, {"cache": 5},
        {"priority": "x"}, {"arguments": ["x"]}, {"arguments": {"num_images_per_prompt": 3}},
        {"arguments": {"height": 100}}, {"arguments": {"num_inference_steps": 3}}, {"arguments": {"generator": 1}},
        {"steps": 0}, {"seed": -1}, {"guidance": float("nan")}, {"strength": 0.5}, {"lora": {"a": float("inf")}},
    ],
)  # fmt: skip
def test_absurd_values_are_no_request(fields, order):
    with pytest.raises(FieldError) as error:
        order(**fields)
    assert error.value.field in (*fields, "image")


def test_every_end_is_told_once(engine, pipe, order, gated):
    told: list[str] = []
    engine.observe(batch=lambda batch: None, job=lambda job: told.append(job.status))
    gate = gated(pipe.transformer)
    gate.shut()
    running = [engine.submit(order(seed=seed)) for seed in range(len(engine._threads) - 1)]
    assert gate.reached.wait(120)
    cancelled, late = engine.submit(order()), engine.submit(order(queue_seconds=0.0))
    cancelled.cancel()
    cancelled.cancel()
    with pytest.raises(DeadlineExceeded):
        late.result(60)
    assert sorted(told) == ["cancelled", "failed"]
    gate.open.set()
    for job in running:
        job.result(120)
    assert sorted(told) == ["cancelled", *["done"] * len(running), "failed"]


@pytest.mark.parametrize(
    "fields", [{"threads": 0}, {"queue": 0}, {"batch": 0}, {"memory": -1}, {"parked": -1}, {"stale": -1.0}]
)
def test_an_engine_that_could_not_work_is_none(fields, pipe):
    with pytest.raises(InputError, match=f"{next(iter(fields))} is"):
        Engine(models={"tiny": pipe}, **fields)


def test_what_is_no_model_or_is_asked_to_be_another_one(pipe):
    with pytest.raises(InputError, match="5 is no model"):
        Engine(models={"tiny": 5})
    for several in (["builtin"], "builtin"):
        with pytest.raises(InputError, match="give aliases with their models"):
            Engine(models=several)
    with pytest.raises(InputError, match="leave out dtype and device"):
        Engine(models={"tiny": Spec(source=pipe, device="cpu")})


def test_what_is_no_request_is_told_what_one_is(engine):
    with pytest.raises(InputError, match=r"'a frog' is no request; give vivace.serve.Request\(prompt=...\)"):
        engine.submit("a frog")


def test_one_denoiser_is_one_models(pipe):
    """The other's preset would be on it."""
    other = StableDiffusion3Img2ImgPipeline(**pipe.components)
    for one in (pipe, other):
        with pytest.raises(InputError, match="good and quick have the same transformer"):
            Engine(models={"good": pipe, "quick": Spec(source=one, preset="fast")})


def test_lora_scale_in_attention_kwargs_is_refused(order):
    with pytest.raises(FieldError, match="lora=\\{alias: weight\\}"):
        order(arguments={"joint_attention_kwargs": {"scale": 0.5}})


def test_unknown_model(engine, order):
    with pytest.raises(UnknownModelError, match="there are tiny"):
        engine.submit(order(model="other"))


def test_requests_at_different_steps_share_calls(engine, pipe, order, gated):
    gate = gated(pipe.transformer)
    gate.shut()
    jobs = [engine.submit(order(seed=1, steps=6))]
    assert gate.reached.wait(120)
    jobs += [engine.submit(order(seed=seed, steps=3 + seed)) for seed in (2, 3, 4)]
    gate.open.set()
    results = [job.result(60) for job in jobs]
    assert [result.effective["steps"] for result in results] == [6, 5, 6, 7]
    # How many meet depends on whose prompt is encoded first: two pairs may take turns.
    assert max(gate.sizes) >= 4, "never two requests (of two rows) in one call"
    assert sum(result.calls["requests_per_call"] > 1 for result in results) >= 2


def test_other_sizes_do_not_mix(engine, pipe, order):
    jobs = [engine.submit(order(size=size, seed=4)) for size in [(64, 64), (32, 64), (64, 64), (64, 32)]]
    sizes = [job.result(60).pictures[0].size for job in jobs]
    assert sizes == [(64, 64), (32, 64), (64, 64), (64, 32)]


def test_deterministic_is_never_batched_and_bit_equal(engine, order):
    alone = engine.submit(order(deterministic=True)).result(60)
    jobs = [engine.submit(order(seed=seed)) for seed in range(4)]
    jobs.insert(2, engine.submit(order(deterministic=True)))
    among = [job.result(60) for job in jobs][2]
    assert among.calls["requests_per_call"] == 1
    assert among.pictures[0].tobytes() == alone.pictures[0].tobytes()


def test_progress_and_previews(engine, order):
    engine.submit(order()).result(60)  # the map from latents to colours is learned from the first picture
    events = list(engine.submit(order(steps=6, preview_every=2)).watch())
    steps = [event for event in events if isinstance(event, Progress)]
    assert [(event.step, event.total) for event in steps] == [(step, 6) for step in range(7)]
    assert steps[0].seconds_left is None
    assert steps[-1].seconds_left == 0
    previews = [event for event in events if isinstance(event, Preview)]
    assert [event.step for event in previews] == [2, 4]
    assert previews[0].picture.size == (SIDE, SIDE)


def test_await_and_async_events(engine, order):
    async def run():
        job = engine.submit(order(steps=4))
        events = [event async for event in job]
        return events, await job

    events, result = asyncio.run(run())
    assert [event.step for event in events] == [0, 1, 2, 3, 4]
    assert result.effective["steps"] == 4


def test_images_and_masks_choose_their_pipeline(engine, order):
    picture = Image.linear_gradient("L").resize((SIDE, SIDE)).convert("RGB")
    plain = engine.submit(order()).result(60)
    edited = engine.submit(order(images=(picture,), strength=0.5, size=None, steps=4)).result(60)
    assert edited.pictures[0].size == (SIDE, SIDE)
    assert edited.effective["strength"] == 0.5
    assert edited.effective["steps"] == 2  # strength leaves half of them out
    assert edited.pictures[0].tobytes() != plain.pictures[0].tobytes()
    painted = engine.submit(order(images=(picture,), mask=picture.convert("L"), strength=0.9)).result(60)
    assert painted.pictures[0].size == (SIDE, SIDE)


def test_a_noise_schedule_that_a_scheduler_does_not_take_is_that_fields_error(start, order):
    with pytest.raises(FieldError, match="noise schedule") as error:
        start(FAMILIES["sdxl"].tiny()).submit(order(scheduler="unclip")).result(60)
    assert error.value.field == "scheduler"


def test_schedulers_are_each_requests_own(engine, pipe, order):
    before = dict(vars(pipe.scheduler))
    heun, euler = (engine.submit(order(scheduler=name, steps=4)) for name in ("heun", "euler"))
    assert heun.result(60).effective["scheduler"] == "FlowMatchHeunDiscreteScheduler"
    assert euler.result(60).effective["scheduler"] == "FlowMatchEulerDiscreteScheduler"
    assert vars(pipe.scheduler).keys() == before.keys()


def test_a_long_video_yields_to_short_pictures(start, order):
    wan, sd3 = FAMILIES["wan"].tiny(), FAMILIES["sd3"].tiny()
    engine = start(wan)
    engine.models["still"] = type(engine.models["tiny"])("still", vivace.serve.Spec(source=sd3))
    video = engine.submit(Request(prompt="a red circle", size=(64, 64), frames=9, steps=60))
    while not video.events and not video.over:
        time.sleep(0.01)
    still = engine.submit(order(model="still"))
    still.result(60)
    assert not video.over, "the picture waited for the whole video"
    assert len(video.result(120).pictures) == 9


def test_closing_fails_what_waits_and_ends_the_threads(pipe, start, order, gated):
    names = {thread.name for thread in threading.enumerate()}
    engine = start(pipe, threads=1)
    gate = gated(pipe.transformer)
    gate.shut()
    running = engine.submit(order())
    assert gate.reached.wait(120)
    waiting = engine.submit(order())
    engine.drain()
    with pytest.raises(Unavailable):
        waiting.result(60)
    with pytest.raises(Unavailable):
        engine.submit(order())
    gate.open.set()
    engine.close(grace=30)
    assert running.status == "done"
    assert {thread.name for thread in threading.enumerate()} <= names


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", ["on", "off"])
def test_alone_or_together_on_a_gpu(start, order, pixels, graphs):
    pipe = FAMILIES["sd3"].tiny().to("cuda")
    engine = start(vivace.serve.Spec(source=pipe, preset=Config(graphs=graphs)))
    alone = [engine.submit(order(seed=seed, steps=8, deterministic=True)).result(60) for seed in range(7)]
    for _ in range(3):  # a graph is recorded at the second call of its size
        jobs = [engine.submit(order(seed=seed, steps=8)) for seed in range(7)]
        together = [job.result(60) for job in jobs]
    assert max(result.calls["requests_per_call"] for result in together) > 1
    for one, other in zip(alone, together, strict=True):
        assert np.abs(pixels(one.pictures[0]) - pixels(other.pictures[0])).mean() < 1
    memory = torch.cuda.memory_allocated()
    cancelled = [engine.submit(order(seed=seed, steps=200)) for seed in range(7)]
    time.sleep(0.3)
    for job in cancelled:
        job.cancel()
        with pytest.raises(Cancelled):
            job.result(30)
    engine.submit(order()).result(60)
    gc.collect()
    assert torch.cuda.memory_allocated() <= memory + 2**20


FORGETFUL = """
from vivace.families import FAMILIES
from vivace.serve import Engine, Request
job = Engine(models={"tiny": FAMILIES["sd3"].tiny()}).submit(Request(prompt="a", size=(64, 64), steps=5000))
while not job.events:
    pass
raise SystemExit(3)
"""


def test_a_process_that_does_not_close_its_engine_ends_as_it_would():
    ended = subprocess.run([sys.executable, "-c", FORGETFUL], capture_output=True, timeout=120, check=False)
    assert ended.returncode == 3, ended.stderr
