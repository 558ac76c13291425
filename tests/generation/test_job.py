"""What a job is refused for, by itself and by the facts of its model."""

from pathlib import Path

import pytest

from vivace.errors import InputError
from vivace.families import FAMILIES
from vivace.generation.job import Job, check_values, frames_problem, nearest_frames, outputs, size_problem
from vivace.load import Source


def wan(variant: str | None = None) -> Source:
    family = FAMILIES["wan"]
    known = {"family": family, "variant": family.variants[variant] if variant else None}
    return Source(name="model", path=None, pipeline="WanPipeline", **known)


@pytest.mark.parametrize(("frames", "nearest"), [(1, 1), (2, 1), (5, 5), (6, 5), (8, 9), (16, 17), (81, 81)])
def test_a_video_has_frames_as_its_vae_packs_them(frames, nearest):
    assert nearest_frames(frames, wan()) == nearest
    problem = frames_problem(frames, wan())
    assert problem is None if frames == nearest else f"the nearest is {nearest}" in (problem or "")


def test_any_number_of_frames_where_the_vae_packs_none():
    source = Source(name="model", path=None, pipeline="StableVideoDiffusionPipeline", family=FAMILIES["svd"])
    assert all(frames_problem(frames, source) is None for frames in range(1, 9))
    assert frames_problem(6, Source(name="model", path=None, pipeline="Unknown", family=None)) is None


def test_a_variant_with_another_vae_has_multiples_of_its_own():
    assert size_problem((1280, 720), wan("2.1-t2v-14b")) is None
    assert "needs multiples of 32; the nearest is 1280x704" in (size_problem((1280, 720), wan("2.2-ti2v-5b")) or "")


@pytest.mark.parametrize("field", ["prompts", "negative"])
def test_a_prompt_that_no_encoder_can_read(field):
    broken = "a \udcff star"  # how Python keeps bytes of the command line that are no UTF-8
    with pytest.raises(InputError, match="not UTF-8"):
        check_values(Job(**{"prompts": ("a star",), field: (broken,) if field == "prompts" else broken}))


def test_a_link_that_leads_nowhere_is_not_replaced(tmp_path: Path):
    link = tmp_path / "out.png"
    link.symlink_to(tmp_path / "none" / "away.png")
    with pytest.raises(InputError, match="exists"):
        outputs(Job(output=link), media="image")
