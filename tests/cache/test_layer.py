"""The cache layer: state belongs to one branch of one request, and to nothing else."""

import contextlib
import gc
import random
import threading

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler

import vivace
from vivace import request
from vivace.cache import parse
from vivace.cache.call import Call, Schedule
from vivace.families import FAMILIES
from vivace.fused import FUSED
from vivace.watch import Watch

POLICIES = (
    "firstblock:threshold=0.4",
    "firstblock:threshold=0.4,order=1",
    "teacache:threshold=0.5,coefficients=1+0",
    "dicache:threshold=0.5",
    "steps:compute=0-3,5,7,9,11,order=2",
    "taylorseer:interval=3",
    "meancache:of50=17",
    "blockdance:after=1",
    "guidance:every=2",
)


class Cancelled(Exception):
    pass


def cancel_at(step: int):
    def stop(pipe, now, timestep, tensors):
        if now == step:
            raise Cancelled
        return {}

    return stop


def sample(denoiser, *, seed: int, steps: int, turn=None) -> torch.Tensor:
    """Euler's method by hand: one request on a bare denoiser."""
    generator = torch.Generator().manual_seed(seed)
    x, text, pooled = (torch.randn(1, *shape, generator=generator) for shape in ((16, 8, 8), (9, 64), (64,)))
    times = torch.linspace(1000, 1000 / steps, steps).tolist()
    with request.open_request(times=times) as now, torch.no_grad():
        for step, time in enumerate(times):
            if turn is not None:
                turn.wait(timeout=60)
            now.step = step
            v = denoiser(x, text, pooled, torch.tensor([time]), return_dict=False)[0]
            x = x - v / steps
    return x


@pytest.mark.parametrize("spelled", [one for one in POLICIES if "guidance" not in one])
def test_two_requests_in_two_threads_give_what_each_gives_alone(pipe, last, spelled):
    denoiser = vivace.accelerate(pipe.transformer, cache=spelled)
    try:
        alone = [sample(denoiser, seed=seed, steps=12) for seed in (1, 2)]
        assert last(denoiser)["skipped"] > 0
        turn, together = threading.Barrier(2), {}
        threads = [
            threading.Thread(
                target=lambda seed=seed: together.update({seed: sample(denoiser, seed=seed, steps=12, turn=turn)})
            )
            for seed in (1, 2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.equal(together[1], alone[0])
        assert torch.equal(together[2], alone[1])
    finally:
        vivace.restore(denoiser)


@pytest.mark.parametrize("spelled", POLICIES)
def test_another_size_batch_or_number_of_steps_never_meets_old_state(pipe, draw, spelled):
    jobs = [{}, {"height": 96}, {"steps": 7}, {"prompt": ["a fox", "a dog"]}, {"guidance_scale": 1.0}, {}]
    vivace.accelerate(pipe, cache=spelled)
    together = [draw(pipe, **job) for job in jobs]
    for job, latents in zip(jobs, together, strict=True):
        vivace.restore(pipe)
        assert torch.equal(draw(vivace.accelerate(pipe, cache=spelled), **job), latents)


def test_fifty_mixed_requests_with_cancels_leave_nothing_behind(pipe, draw):
    rng, exact = random.Random(0), draw(pipe)
    vivace.accelerate(pipe, fuse="off")
    plain = draw(pipe)
    gc.collect()
    held = tensor_bytes()
    for _ in range(50):
        vivace.accelerate(pipe, cache=rng.choice(POLICIES), fuse=rng.choice(["on", "off"]))
        arguments = {"steps": rng.randint(2, 9), "height": rng.choice([64, 96]), "seed": rng.randint(0, 9)}
        stop = {"callback_on_step_end": cancel_at(rng.randint(0, 5))} if rng.random() < 0.4 else {}
        with contextlib.suppress(Cancelled):
            draw(pipe, **arguments, **stop)
        assert request.current() is None
    vivace.accelerate(pipe, fuse="off")
    assert torch.equal(draw(pipe), plain)
    gc.collect()
    assert tensor_bytes() == held
    vivace.restore(pipe)
    assert torch.equal(draw(pipe), exact)


def tensor_bytes() -> int:
    """Bytes of all plain tensors that are alive."""
    plain = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
    return sum(t.nbytes for t in plain if t.layout is torch.strided)


@pytest.mark.parametrize("scheduler", [HeunDiscreteScheduler, PNDMScheduler])
def test_schedulers_that_repeat_a_timestep(unet_pipe, last, scheduler):
    def latents(**extra):
        generator = torch.Generator().manual_seed(0)
        return unet_pipe("a fox", num_inference_steps=6, output_type="latent", generator=generator, **extra).images

    stock = unet_pipe.scheduler
    try:
        unet_pipe.scheduler = scheduler.from_config(stock.config)
        exact = latents()
        calls = len(unet_pipe.scheduler.timesteps)
        assert calls > 6
        vivace.accelerate(unet_pipe, cache="steps:compute=0-3,5,7,9-40,order=1")
        fast = latents()
        assert last(unet_pipe)["skipped_steps"] == [step for step in (4, 6, 8) if step < calls]
        assert torch.isfinite(fast).all()
        assert ((fast - exact).norm() / exact.norm()) < 0.3
    finally:
        vivace.restore(unet_pipe)
        unet_pipe.scheduler = stock


def test_heun_of_a_flow_model(pipe, draw, last):
    pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    exact = draw(pipe, steps=6)
    vivace.accelerate(pipe, cache="taylorseer:interval=2")
    fast = draw(pipe, steps=6)
    assert last(pipe)["skipped"] >= 3
    assert 0 < (fast - exact).norm() / exact.norm() < 0.1


@pytest.mark.parametrize("spelled", ["meancache:of50=10", "steps:compute=0,2,order=0", "taylorseer:interval=3"])
def test_whoever_writes_into_an_output_changes_nothing_that_is_remembered(spelled):
    """Also where two steps have one time, as Heun's have."""
    policy = parse(spelled)

    def outputs(after) -> list[torch.Tensor]:
        times, memory, found = tuple(9.0 - (i + 1) // 2 for i in range(17)), policy.fresh(), []
        for step in range(len(times)):
            call = Call(step=step, schedule=Schedule(times=times), kwargs={}, forward=dict, run=run)
            out = policy.serve(memory, call)
            found.append(out.clone())
            after(out)
        return found

    def run(name, forward, **kwargs):
        return torch.ones(1, 3)

    assert torch.equal(torch.stack(outputs(lambda out: None)), torch.stack(outputs(lambda out: out.zero_())))


def test_image_to_image_starts_late(last):
    from PIL import Image

    pipe = FAMILIES["sd3"].tiny("StableDiffusion3Img2ImgPipeline")
    vivace.accelerate(pipe, cache="steps:compute=6,8,9")
    picture = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    pipe("a fox", image=picture, strength=0.5, num_inference_steps=10, output_type="latent", height=64, width=64)
    # Steps count from the scheduler's first: 5 is the first one here, computed because nothing is known before it.
    did = last(pipe)
    assert (did["computed"], did["skipped_steps"]) == (4, [2])


def test_cond_and_uncond_are_kept_apart(last):
    """FLUX calls its transformer twice a step under guidance; each call must see its own past."""
    pipe = FAMILIES["flux"].tiny()

    def latents(cache=None, scale=3.0):
        vivace.accelerate(pipe, cache=cache)
        return pipe(
            "a fox", negative_prompt="a dog", true_cfg_scale=scale, num_inference_steps=6, output_type="latent",
            height=64, width=64, generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip

    exact, fast = latents(), latents("steps:compute=0,2,4")
    assert last(pipe)["computed"] == last(pipe)["skipped"] == 6
    swapped = ((fast - exact).norm() / exact.norm()).item()
    assert 0 < swapped < 0.05
    latents("guidance:every=2")
    assert last(pipe)["skipped_steps"] == [3, 5]
    latents("guidance:begin=0.5,every=1")
    assert last(pipe)["skipped_steps"] == [0, 1, 2]
    latents("guidance:end=0.5,every=1")
    assert last(pipe)["skipped_steps"] == [3, 4, 5]
    nowhere = latents("guidance:end=0.1,every=1")
    torch.testing.assert_close(nowhere, latents(scale=1.0))


def test_guidance_in_an_interval_of_one_batch(unet_pipe, last):
    def latents(cache, **extra):
        vivace.accelerate(unet_pipe, cache=cache)
        generator = torch.Generator().manual_seed(0)
        return unet_pipe("a fox", num_inference_steps=8, output_type="latent", generator=generator, **extra).images

    try:
        late = latents("guidance:begin=0.5,every=1")
        assert last(unet_pipe)["skipped_steps"] == [1, 2, 3], "before the first step nothing tells the halves apart"
        early = latents("guidance:end=0.5,every=1")
        assert last(unet_pipe)["skipped_steps"] == [4, 5, 6, 7]
        always, never = latents(None), latents(None, guidance_scale=1.0)
        assert not any(torch.allclose(one, other) for one in (late, early) for other in (always, never))
    finally:
        vivace.restore(unet_pipe)


def test_a_second_call_at_the_same_step_is_computed_and_not_remembered(pipe, draw, last):
    vivace.accelerate(pipe, cache="steps:compute=0-1")
    alone = draw(pipe)

    def ask_again(pipe, step, timestep, tensors):
        pipe.transformer(torch.randn(2, 16, 8, 8), torch.randn(2, 77, 64), torch.randn(2, 64), torch.full((2,), 500.0))
        return {}

    assert torch.equal(draw(pipe, callback_on_step_end=ask_again), alone)


def test_a_prompt_that_changes_on_the_way_starts_anew(pipe, draw, last):
    vivace.accelerate(pipe, cache="steps:compute=0-1")

    def change(pipe, step, timestep, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"] * 0.5} if step == 5 else {}

    inputs = ["latents", "prompt_embeds"]
    draw(pipe, callback_on_step_end=change, callback_on_step_end_tensor_inputs=inputs)
    assert last(pipe)["skipped_steps"] == [2, 3, 4, 5, 7, 8, 9, 10, 11]


def test_outside_a_pipeline_everything_is_computed_and_the_report_says_so(pipe):
    denoiser = vivace.accelerate(pipe.transformer, cache="steps:compute=0")
    try:
        arguments = (torch.randn(1, 16, 8, 8), torch.randn(1, 9, 64), torch.randn(1, 64), torch.tensor([500.0]))
        with torch.no_grad():
            a, b = denoiser(*arguments).sample, denoiser(*arguments).sample
        assert torch.equal(a, b)
        assert "called outside a pipeline" in str(vivace.report(denoiser))
    finally:
        vivace.restore(denoiser)


def test_gradients_are_never_cached(pipe):
    denoiser = vivace.accelerate(pipe.transformer, cache="steps:compute=0", fuse="off")
    try:
        with request.open_request(times=(1000.0, 500.0)) as now:
            for now.step in range(2):
                out = denoiser(torch.randn(1, 16, 8, 8), torch.randn(1, 9, 64), torch.randn(1, 64), torch.tensor([5.0]))
                out.sample.sum().backward()
        assert "gradients are enabled" in str(vivace.report(denoiser))
    finally:
        vivace.restore(denoiser)
        denoiser.zero_grad()


STACKED = (
    "firstblock:threshold=9",
    "dicache:retain=0,threshold=9",
    "blockdance:after=1,begin=0,end=1",
    "magcache:ratios=1+1",
)
ANY = ("steps:compute=0", "taylorseer:warmup=1,interval=9", "pab:warmup=0,cooldown=0,self_every=9,cross_every=9")


@pytest.mark.parametrize(
    ("family", "fuse"), [(name, fuse) for name in FAMILIES for fuse in ("off", "on") if fuse == "off" or name in FUSED]
)
def test_a_step_that_repeats_the_last_ones_input_is_skipped_without_loss(family, fuse):
    """Whatever is reused is then right, so the output must be what was computed."""
    one = FAMILIES[family]
    denoiser = one.denoisers[0]
    denoiser = getattr(one.tiny(), denoiser)
    frames = {"frames": 5} if one.media == "video" else {}
    arguments = one.inputs(denoiser, size=(64, 64), **frames)
    unet = "up_blocks" in one.blocks
    spelled = [one for one in ANY if fuse == "off" or "pab" not in one]
    spelled += ("deepcache", "deepcache:levels=2") if unet else STACKED
    if one.signal is not None:
        spelled.append("teacache:coefficients=0+0,threshold=9")
    for cache in spelled:
        vivace.accelerate(denoiser, cache=cache, fuse=fuse)
        outputs = same_input_twice(denoiser, arguments)
        (found,) = vivace.report(denoiser).cache.values()
        assert found["last_request"]["skipped_steps"] == [1], cache
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5, msg=cache)


def same_input_twice(denoiser, arguments) -> list[torch.Tensor]:
    with request.open_request(times=(1000.0, 999.0)) as now, torch.no_grad():
        outputs = []
        for now.step in range(2):
            outputs.append(denoiser(**arguments)[0])
    return [out if isinstance(out, torch.Tensor) else torch.stack(list(out)) for out in outputs]


@pytest.mark.parametrize("fuse", ["on", "off"])
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_deepcache_keeps_a_controlnets_residuals(levels, fuse):
    pipe = FAMILIES["sd"].tiny("StableDiffusionControlNetPipeline")
    arguments = FAMILIES["sd"].inputs(pipe.unet, size=(64, 64))
    picture = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        down, mid = pipe.controlnet(
            arguments["sample"], arguments["timestep"], arguments["encoder_hidden_states"], picture, return_dict=False
        )
    arguments |= {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    vivace.accelerate(pipe.unet, cache=f"deepcache:levels={levels}", fuse=fuse)
    first, second = same_input_twice(pipe.unet, arguments)
    torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spelled", ["firstblock:threshold=0.3", "steps:compute=0-5,7-8,10-11", "pab"])
def test_a_lora_on_the_blocks(pipe, draw, last, spelled):
    from peft import LoraConfig

    plain = draw(pipe)
    torch.manual_seed(3)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    try:
        exact = draw(pipe)
        fast = draw(vivace.accelerate(pipe, cache=spelled))
        assert last(pipe)["skipped"] > 0
        assert (fast - exact).norm() < 0.5 * (plain - exact).norm()
    finally:
        vivace.restore(pipe)
        pipe.transformer.delete_adapters("default")
        pipe.transformer.unload_lora()


class Replaced:
    """Waited for at every step: before one of them it puts other weights in."""

    def __init__(self, module: torch.nn.Module, *, before: int):
        self.module, self.left = module, before

    def wait(self, timeout: float) -> None:
        if self.left == 0:
            self.module.weight = torch.nn.Parameter(2 * self.module.weight, requires_grad=False)
        self.left -= 1


def test_a_step_known_to_be_skipped_looks_at_no_weight_and_the_next_sees_what_was_replaced(pipe, monkeypatch):
    denoiser = vivace.accelerate(pipe.transformer, cache="steps:compute=0,3,6,7")
    looked, changed = [], Watch.changed
    monkeypatch.setattr(Watch, "changed", lambda watch: looked.append(watch) or changed(watch))
    plain = sample(denoiser, seed=1, steps=8)
    looked.clear()
    assert torch.equal(sample(denoiser, seed=1, steps=8), plain)
    assert len(looked) == 4
    stock = denoiser.proj_out.weight
    found = []
    for before in (1, 3, 4):
        found.append(sample(denoiser, seed=1, steps=8, turn=Replaced(denoiser.proj_out, before=before)))
        denoiser.proj_out.weight = stock
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])
    assert not torch.equal(found[2], plain)
    assert torch.equal(sample(denoiser, seed=1, steps=8), plain)
    vivace.restore(denoiser)


def test_a_policy_that_asks_the_first_block_computes_anew_what_was_replaced_in_mid_request(pipe, last):
    denoiser = vivace.accelerate(pipe.transformer, cache="firstblock:threshold=1000,warmup=1")
    plain = sample(denoiser, seed=1, steps=8)
    assert (last(denoiser)["computed"], last(denoiser)["skipped"]) == (1, 7)
    first = denoiser.transformer_blocks[0].attn.to_q
    stock = first.weight
    replaced = sample(denoiser, seed=1, steps=8, turn=Replaced(first, before=3))
    # The step whose front showed it is not skipped: what is remembered is of other weights.
    assert (last(denoiser)["computed"], last(denoiser)["skipped"]) == (2, 6)
    assert not torch.equal(replaced, plain)
    first.weight = stock
    assert torch.equal(sample(denoiser, seed=1, steps=8), plain)
    vivace.restore(denoiser)


def test_a_skipped_step_looks_only_at_what_it_computes_with_and_the_next_computed_one_at_all(pipe, last, monkeypatch):
    denoiser = vivace.accelerate(pipe.transformer, cache="firstblock:threshold=1000,max_skips=3")
    plain = sample(denoiser, seed=1, steps=8)
    assert last(denoiser)["skipped_steps"] == [1, 2, 3, 5, 6, 7]
    far = denoiser.transformer_blocks[-1].attn.to_q
    stock = far.weight
    found = []
    for before in (2, 4):
        found.append(sample(denoiser, seed=1, steps=8, turn=Replaced(far, before=before)))
        # What was remembered is of other weights: the step that sees it begins anew.
        assert last(denoiser)["skipped_steps"] == [1, 2, 3, 5, 6, 7]
        far.weight = stock
    assert torch.equal(*found)
    assert not torch.equal(found[0], plain)
    assert torch.equal(sample(denoiser, seed=1, steps=8), plain)
    seen, changed = [], Watch.changed
    monkeypatch.setattr(Watch, "changed", lambda watch: seen.append(len(watch._storages)) or changed(watch))
    sample(denoiser, seed=1, steps=4)
    whole = sum(1 for _ in denoiser.parameters())
    near = whole - sum(1 for _ in denoiser.transformer_blocks[1:].parameters())
    # The first step: before it, so that nothing stale is replayed, and what it computes, while it does.
    assert seen == [whole, near, whole, near, near, near]
    vivace.restore(denoiser)
