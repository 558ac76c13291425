"""Requests: one per pipeline call, also across threads, exceptions and nesting; and what they know."""

import dataclasses
import threading

import pytest
import torch
from diffusers import HeunDiscreteScheduler, PNDMScheduler

import vivace
from vivace import request
from vivace.accelerate import acceleration_of


def steps_seen(pipe, call) -> list[int]:
    seen = []
    handle = pipe.register_forward_pre_hook(lambda *_: seen.append(request.current().step))
    try:
        call()
    finally:
        handle.remove()
    return seen


def test_none_outside():
    assert request.current() is None
    with request.open_request() as outer:
        with request.open_request() as inner:
            assert request.current() is inner is not outer
        assert request.current() is outer
    assert request.current() is None


def test_every_thread_has_its_own():
    seen, together = {}, threading.Barrier(4)

    def work(name):
        with request.open_request() as mine:
            together.wait()
            mine.step = name
            together.wait()
            seen[name] = request.current().step

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {name: name for name in range(4)}


def test_counts_the_steps_of_one_call(sd3_pipe, sd3_latents):
    vivace.accelerate(sd3_pipe)
    for _ in range(2):
        assert steps_seen(sd3_pipe.transformer, lambda: sd3_latents(sd3_pipe)) == [0, 1, 2]
    assert request.current() is None


def test_an_exception_ends_the_request(sd3_pipe, sd3_latents):
    vivace.accelerate(sd3_pipe)

    def stop(pipe, step, timestep, tensors):
        assert request.current().step == 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sd3_latents(sd3_pipe, callback_on_step_end=stop)
    assert request.current() is None
    assert steps_seen(sd3_pipe.transformer, lambda: sd3_latents(sd3_pipe)) == [0, 1, 2]


@pytest.mark.parametrize("scheduler", [HeunDiscreteScheduler, PNDMScheduler])
def test_schedulers_that_repeat_a_timestep(unet_pipe, scheduler):
    stock = unet_pipe.scheduler
    vivace.accelerate(unet_pipe)
    try:
        # Put in after accelerate, as people do.
        unet_pipe.scheduler = scheduler.from_config(stock.config)
        seen = steps_seen(unet_pipe.unet, lambda: unet_pipe("a fox", num_inference_steps=4, output_type="latent"))
        assert seen == list(range(len(unet_pipe.scheduler.timesteps)))
        assert len(seen) > 4
        assert type(unet_pipe.scheduler).__mro__[1] is scheduler
    finally:
        vivace.restore(unet_pipe)
        assert type(unet_pipe.scheduler) is scheduler
        unet_pipe.scheduler = stock


def test_the_branch_that_the_pipeline_names():
    from vivace.families import FAMILIES

    pipe = FAMILIES["flux"].tiny()
    pipe.set_progress_bar_config(disable=True)
    vivace.accelerate(pipe)
    seen = []
    pipe.transformer.register_forward_pre_hook(lambda *_: seen.append(request.current().branch))
    pipe("a fox", num_inference_steps=1, true_cfg_scale=2.0, negative_prompt="a dog", output_type="latent")
    assert seen == ["cond", "uncond"]


def test_text_is_projected_once_per_prompt(sd3_pipe, sd3_latents):
    calls = []
    vivace.accelerate(sd3_pipe)
    lane = acceleration_of(sd3_pipe).target.lanes["transformer"]
    lane.split = dataclasses.replace(lane.split, once=counted(lane.split.once, calls))
    sd3_latents(sd3_pipe)
    sd3_latents(sd3_pipe)
    assert len(calls) == 2


def counted(function, calls):
    def wrapper(**kwargs):
        calls.append(1)
        return function(**kwargs)

    return wrapper


def test_a_prompt_changed_in_place_is_seen(sd3_pipe, sd3_latents):
    def change(pipe, step, timestep, tensors):
        if step == 0:
            tensors["prompt_embeds"].mul_(0.5)
        return {}

    arguments = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    stock = sd3_latents(sd3_pipe, **arguments)
    unchanged = sd3_latents(sd3_pipe)
    vivace.accelerate(sd3_pipe)
    torch.testing.assert_close(sd3_latents(sd3_pipe, **arguments), stock, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(stock, unchanged, atol=1e-3)


def test_steps_count_for_who_took_hold_of_the_schedulers_step_before_the_first_call(sd3_pipe, sd3_latents):
    vivace.accelerate(sd3_pipe)
    step = sd3_pipe.scheduler.step
    sd3_pipe.scheduler.step = lambda *args, **kwargs: step(*args, **kwargs)
    assert steps_seen(sd3_pipe.transformer, lambda: sd3_latents(sd3_pipe)) == [0, 1, 2]
