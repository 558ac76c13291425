"""The losses on tiny models of every backbone: what they reach, what they leave alone, and where they start."""

import dataclasses

import pytest
import torch

from vivace import request
from vivace.distill import Stage, Student
from vivace.distill.student import make_student, trainable

STAGE = Stage(batches=1, steps=4, guidance=(2.0, 4.0), modes=(0.0, 0.0, 0.5, 0.5))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gradients(module: torch.nn.Module) -> list[bool]:
    """Which parameters have a gradient that is not zero; forgets it."""
    found = [p.grad is not None and bool(p.grad.abs().max() > 0) for p in module.parameters()]
    module.zero_grad(set_to_none=True)
    return found


def test_the_students_losses_reach_only_the_student(actors, batch):
    objective, student, discriminator = actors.objective, actors.student, actors.discriminator
    item = actors.prepare(batch)
    start = objective.start(item, STAGE, actors.student, generator())
    target = objective.target(item, start, student)
    picture = objective.predict(student, start, item)
    losses = {
        "distance": objective.distance(picture, target, item, start),
        "fooling": objective.fooling(discriminator, picture, item, start, generator(1)),
    }
    for name, loss in losses.items():
        loss.backward(retain_graph=True)
        assert not any(gradients(actors.teacher)), name
        assert not any(gradients(discriminator)), name
        assert not any(gradients(actors.pipe.vae)), name
        assert any(gradients(student)), name
    assert all(p.requires_grad for p in discriminator.parameters())


def test_the_discriminators_loss_reaches_only_the_discriminator(actors, batch):
    objective, student, discriminator = actors.objective, actors.student, actors.discriminator
    item = actors.prepare(batch)
    start = objective.start(item, STAGE, actors.student, generator())
    picture = objective.predict(student, start, item)
    objective.telling(discriminator, item.z, picture, item, start, generator(1)).backward()
    assert all(gradients(discriminator))
    assert not any(gradients(student))
    assert not any(gradients(actors.teacher))


def test_the_critics_loss_reaches_only_the_critic(actors, batch):
    objective, student = actors.objective, actors.student
    critic = make_student(actors.teacher, Student(rank=2))
    item = actors.prepare(batch)
    start = objective.start(item, STAGE, student, generator())
    picture = objective.predict(student, start, item)
    objective.denoising(critic, picture, item, start, generator(1)).backward()
    assert any(gradients(critic))
    assert not any(gradients(student))
    assert not any(gradients(actors.teacher))


def test_matching_needs_a_student_that_differs(actors, batch):
    objective, student = actors.objective, actors.student
    item = actors.prepare(batch)
    picture = objective.predict(student, objective.start(item, STAGE, actors.student, generator()), item)
    loss = objective.matching(picture, item, STAGE, student, generator(2))
    embedded = not item.call.halves
    # A LoRA begins as nothing, so the student sees what the unguided teacher sees.
    assert (float(loss.detach()) < 1e-8) == embedded
    loss.backward()
    assert not any(gradients(actors.teacher))
    assert any(gradients(student)) != embedded


def test_a_student_begins_as_its_teacher(actors, batch):
    objective = actors.objective
    item = actors.prepare(batch)
    call = objective.told(item, 3.0)
    sigma = torch.full((2,), objective.view.levels.at(500.0), dtype=torch.float64)
    with torch.no_grad():
        ours, theirs = (
            objective.view.denoised(module, item.z, sigma, call) for module in (actors.student, actors.teacher)
        )
    assert torch.equal(ours, theirs)


def test_pure_noise_starts_pure_and_lower_levels_mix(actors_of, batch):
    actors = actors_of("sdxl")
    item = actors.prepare(batch)
    first = dataclasses.replace(STAGE, modes=(1.0, 0.0, 0.0, 0.0))
    starts = (actors.objective.start(item, first, actors.student, generator(seed)) for seed in range(9))
    pure = next(start for start in starts if len(start.grid) == 5)
    assert abs(float(pure.x.std()) - 1) < 0.1
    low = actors.objective.start(item, dataclasses.replace(STAGE, modes=(0, 0, 0, 1.0)), actors.student, generator(1))
    assert len(low.grid) < 4
    assert 2.0 <= low.guidance <= 4.0
    alpha = actors.objective.view.levels.alpha(low.grid[:1])
    noise = (low.x - float(alpha) * item.z) / float(low.grid[0])
    assert abs(float(noise.std()) - 1) < 0.2


def test_simulated_starts_are_the_students_own_pictures_under_noise(actors_of, batch):
    actors = actors_of("sd3")
    item, believed = actors.prepare(batch), torch.linspace(-2, 2, 16)
    picture = believed.repeat(item.z.numel() // 16).view_as(item.z)
    seen = []

    def student(*, hidden_states, timestep, **kwargs):
        seen.append(float(timestep[0]) / 1000)
        return ((hidden_states - picture) * 1000 / timestep.view(-1, 1, 1, 1),)  # the flow that leads to `picture`

    stage = Stage(batches=1, steps=400, modes=(0, 0, 0, 1.0), simulated=1.0)
    start = actors.objective.start(item, stage, student, generator())
    level, levels = float(start.grid[0]), actors.objective.view.levels.grid(400)
    # The sampler's three steps before, each of which leads to the next.
    assert seen == pytest.approx([float(levels[place]) for place in (0, 100, 200)], abs=1e-4)
    noise = (start.x - (1 - level) * picture) / level
    assert abs(float(noise.std()) - 1) < 0.2
    assert abs(float((noise * picture).mean())) < 0.2


@pytest.mark.parametrize("distance", ["l2", "l1", "huber", "features"])
def test_every_distance_is_nothing_between_equals(actors_of, batch, distance):
    actors = actors_of("sd3")
    objective = dataclasses.replace(actors.objective, config=dataclasses.replace(actors.config, distance=distance))
    item = actors.prepare(batch)
    start = objective.start(item, STAGE, actors.student, generator())
    assert float(objective.distance(item.z, item.z, item, start)) == pytest.approx(0, abs=1e-6)
    assert float(objective.distance(item.z, item.z + 0.5 * torch.randn_like(item.z), item, start)) > 1e-4


def test_consistency_targets_the_student_one_step_on(actors_of, batch):
    actors = actors_of("sdxl")
    config = dataclasses.replace(actors.config, method="consistency")
    objective = dataclasses.replace(actors.objective, config=config)
    item = actors.prepare(batch)
    start = objective.start(item, dataclasses.replace(STAGE, modes=(1.0, 0, 0, 0)), actors.student, generator(3))
    target = objective.target(item, start, actors.student)
    calls = []
    with torch.no_grad():
        hook = actors.teacher.register_forward_pre_hook(lambda *_: calls.append(1))
        again = objective.target(item, start, actors.student)
        hook.remove()
    assert len(calls) == 1  # one teacher call, with both halves
    assert torch.equal(target, again)
    assert not target.requires_grad


def test_trainable_weights_are_the_loras_in_float32(actors):
    names = trainable(actors.student)
    assert names
    assert all(".lora_" in name for name in names)
    assert all(parameter.dtype == torch.float32 for parameter in names.values())


@pytest.mark.parametrize(
    ("preset", "expected"), [("fast", [True, True, False, False, True, True]), ("exact", 6 * [False])]
)
def test_the_rollouts_first_and_last_steps_keep_to_16_bit_as_the_preset_says(actors_of, batch, preset, expected):
    actors = actors_of("sd3")
    objective = dataclasses.replace(actors.objective, config=dataclasses.replace(actors.config, accelerate=preset))
    item, seen = actors.prepare(batch), []
    stage = dataclasses.replace(STAGE, steps=6, modes=(1.0,))
    hook = actors.teacher.register_forward_pre_hook(lambda *_: seen.append(request.EXACT.get()))
    try:
        for seed in range(20):
            start = objective.start(item, stage, actors.student, generator(seed))
            objective.target(item, start, actors.student)
            assert seen == expected[7 - len(start.grid) :]
            seen.clear()
        objective.matching(item.z, item, stage, actors.student, generator())
    finally:
        hook.remove()
    assert seen == [preset == "fast"]
    assert not request.EXACT.get()
