"""Sample grids: drawn through the stock pipeline of every backbone, which is left as it was."""

import dataclasses

import pytest

from vivace.distill import Records
from vivace.distill.grid import draw_grid

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
