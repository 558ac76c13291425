from functools import partial

import pytest
import torch

from vivace.errors import InputError
from vivace.evals.metric import table, to_json
from vivace.evals.noise_floor import compare_runs, fewer_steps
from vivace.evals.sample import Output, in_dtype, sample

PROMPTS = ("a red circle", "a blue square above a star", "a frog")


def test_sample_gives_what_the_pipeline_gives_and_leaves_it_as_it_was(pipe):
    output = sample(pipe, PROMPTS[:1], steps=3, seed=7)
    generator = torch.Generator().manual_seed(7)
    latents = pipe(PROMPTS[0], num_inference_steps=3, generator=generator, output_type="latent").images
    pictures = pipe(PROMPTS[0], num_inference_steps=3, generator=generator.manual_seed(7), output_type="pt").images
    assert torch.equal(output.latents, latents)
    assert torch.equal(output.pictures, pictures)
    assert "step" not in vars(pipe.scheduler)


def test_batch_and_order_change_nothing_but_rounding(pipe):
    whole = sample(pipe, PROMPTS, steps=3)
    for other in (sample(pipe, PROMPTS, steps=3, batch=1), sample(pipe, PROMPTS, steps=3, batch=2, reverse=True)):
        torch.testing.assert_close(other.latents, whole.latents, rtol=1e-3, atol=1e-3)
    # Different prompts and noise: an order that came back wrong would not pass.
    assert (whole.latents[0] - whole.latents[2]).abs().max() > 0.1
    with pytest.raises(InputError, match="no prompts"):
        sample(pipe, [], steps=3)


def test_in_dtype_computes_in_it_and_gives_every_weight_back(pipe):
    before = {name: (p, p.data_ptr(), p.clone()) for name, p in pipe.unet.named_parameters()}
    exact = sample(pipe, PROMPTS[:1], steps=2)
    with in_dtype(pipe, torch.bfloat16):
        assert pipe.unet.dtype == torch.bfloat16
        rounded = sample(pipe, PROMPTS[:1], steps=2)
    assert rounded.latents.dtype == torch.bfloat16
    for name, parameter in pipe.unet.named_parameters():
        assert parameter is before[name][0]
        assert parameter.data_ptr() == before[name][1]
        assert torch.equal(parameter, before[name][2])
    assert torch.equal(sample(pipe, PROMPTS[:1], steps=2).latents, exact.latents)


def test_a_candidate_stands_between_the_floor_and_fewer_steps(pipe):
    draw = partial(sample, pipe, PROMPTS, steps=8)

    def perturbed() -> Output:
        with in_dtype(pipe, torch.bfloat16):
            return draw()

    found = compare_runs(
        draw,
        floors={"one at a time": partial(draw, batch=1), "reversed": partial(draw, reverse=True)},
        candidates={"bfloat16": perturbed, "same": draw},
        fewer=fewer_steps(draw, steps=(7, 4, 2)),
    )
    assert found.times_floor("same") == 0.0
    assert found.times_floor("bfloat16") > 10
    errors = [d.latent_error.mean() for d in found.role("fewer steps").values()]
    assert found.floor < errors[0] < errors[1] < errors[2]
    assert found.steps_as_good("same") is None
    assert len(found.metrics) == 1 + 4 * 7
    assert found.metrics[0].of == "exact"
    assert '"of": "fewer steps: 4"' in to_json(found.metrics)
    assert table(found.metrics).row_count == len(found.metrics)


def test_steps_as_good_is_the_fewest_that_come_as_close():
    def output(error: float) -> Output:
        latents = torch.ones(2, 4) * (1 + error)
        return Output(latents=latents, pictures=torch.full((2, 3, 16, 16), 0.5 + error))

    found = compare_runs(
        lambda: output(0.0),
        floors={"other order": lambda: output(0.01)},
        candidates={"cached": lambda: output(0.05)},
        fewer={20: lambda: output(0.02), 14: lambda: output(0.04), 10: lambda: output(0.1)},
    )
    assert found.steps_as_good("cached") == 14
    assert found.floor == pytest.approx(0.01, rel=1e-5)
    assert found.times_floor("cached") == pytest.approx(5.0, rel=1e-4)
    assert found.role("candidate")["cached"].psnr.tolist() == pytest.approx([26.0206, 26.0206], abs=1e-3)


def test_a_distance_without_a_floor_is_refused():
    with pytest.raises(InputError, match="got no floors"):
        compare_runs(lambda: pytest.fail("ran"), floors={}, candidates={})
