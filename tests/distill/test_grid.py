"""Sample grids: drawn through the stock pipeline of every backbone, which is left as it was."""

import dataclasses

import pytest
import torch
from PIL import Image

from vivace.distill import Conditioner, Records, train
from vivace.distill.call import pack, quiet_of, unpack
from vivace.distill.grid import draw_conditioned, draw_grid, first_item, sampling
from vivace.distill.objective import Start
from vivace.families import FAMILIES

RECORDS = Records(trackers=(), prompts=("a red ring", "a blue star"), steps=(4, 1))


@pytest.mark.parametrize("backbone", ["builtin", "sd15", "sdxl", "pixart", "sd3", "flux"])
def test_a_row_for_each_number_of_steps(actors_of, backbone):
    actors = actors_of(backbone)
    pipe, slot = actors.pipe, actors.family.denoisers[0]
    before, calls = dict(pipe.components), []
    hook = actors.student.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        sheet = draw_grid(pipe, actors.student, dataclasses.replace(actors.config, records=RECORDS), slot=slot)
    finally:
        hook.remove()
    assert sheet.size == (2 * 64, 2 * 64)
    assert len(calls) == 4 + 1
    assert len(set(sheet.tobytes())) > 10  # neither black nor NaN
    assert all(pipe.components[name] is part for name, part in before.items())


@pytest.mark.parametrize("backbone", ["builtin", "sd15", "sdxl", "pixart", "sd3", "flux"])
def test_one_step_of_the_stock_pipeline_is_what_training_predicts(actors_of, batch, backbone):
    actors = actors_of(backbone)
    item, view = actors.prepare(batch), actors.objective.view
    noise = torch.randn(item.z.shape, generator=torch.Generator().manual_seed(5))
    levels = view.levels.grid(1, tokens=actors.objective.tokens(item.z))
    packed, guidance = item.call.packed, 1.0 if item.call.halves else 3.0
    call = {"num_inference_steps": 1, "guidance_scale": guidance, "height": 64, "width": 64, "output_type": "latent"}
    quiet, slot = quiet_of(actors.pipe), actors.family.denoisers[0]
    with torch.no_grad(), sampling(actors.pipe, actors.student, slot=slot) as pipe:
        expected = actors.objective.predict(actors.student, Start(noise, levels, guidance), item)
        found = pipe(list(batch.captions), latents=pack(noise) if packed else noise, **call, **quiet).images
    found = unpack(found, height=8, width=8) if packed else found
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("backbone", ["sd15-inpaint", "sdxl-adapter", "sdxl-upscale", "sd3"])
def test_with_conditions_the_students_pictures_are_below_the_datas(actors_of, backbone):
    actors = actors_of(backbone)
    records = Records(trackers=(), steps=(4, 1))
    actors = dataclasses.replace(actors, config=dataclasses.replace(actors.config, records=records))
    item, calls = first_item(actors), []
    hook = actors.student.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        sheet = draw_conditioned(actors, actors.student, item)
    finally:
        hook.remove()
    assert sheet.size == (2 * 64, 3 * 64)
    assert len(calls) == 4 + 1
    rows = [sheet.crop((0, 64 * row, 128, 64 * (row + 1))).tobytes() for row in range(3)]
    assert len(set(rows)) == 3
    assert min(len(set(row)) for row in rows) > 10  # neither black nor NaN
    shown = actors.decode(item.z[:1])
    assert shown.shape == (1, 3, 64, 64)
    assert actors.encode(shown).shape == item.z[:1].shape


def test_training_with_conditions_draws_the_same_samples_again(config, tmp_path):
    """And what it learns does not depend on whether it draws."""
    chosen = config(
        conditioners=(Conditioner(join="argument", argument="image", source="edges"),),
        records=Records(trackers=(), sample_every=1, save_every=2, steps=(1,)),
    )
    stages = (dataclasses.replace(chosen.stages[0], batches=2),)
    runs = {}
    for name, every in (("drawn", 1), ("blind", 0)):
        records = dataclasses.replace(chosen.records, sample_every=every)
        own = dataclasses.replace(chosen, stages=stages, records=records, output=str(tmp_path / name))
        pipe = FAMILIES["sdxl"].tiny("StableDiffusionXLAdapterPipeline")
        runs[name] = train(own, pipe=pipe).losses
    assert runs["drawn"] == runs["blind"]
    sheets = [Image.open(tmp_path / "drawn" / "samples" / f"{number:08d}.png") for number in (1, 2)]
    first = [sheet.crop((0, 0, 128, 64)).tobytes() for sheet in sheets]
    assert first[0] == first[1]
    assert not (tmp_path / "blind" / "samples").exists()
