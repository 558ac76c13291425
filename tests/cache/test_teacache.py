"""TeaCache: the published polynomials find their models, and the sum of changes decides."""

import json

import pytest
import torch

import vivace
from vivace import Config, InputError
from vivace.cache import TeaCache
from vivace.cache.calibration import fingerprint
from vivace.cache.teacache import polynomial
from vivace.families import FAMILIES
from vivace.passes.target import Target

PUBLISHED = [(f, v) for f, family in FAMILIES.items() for v, variant in family.variants.items() if variant.teacache]


def target_of(family: str, variant: str) -> Target:
    one = FAMILIES[family]
    denoiser = one.full(variant, device="meta")
    return Target(subject=denoiser, family=one, config=Config(), denoisers={"transformer": denoiser})


@pytest.mark.parametrize(("family", "variant"), PUBLISHED)
def test_a_published_model_finds_its_polynomial(family, variant):
    target = target_of(family, variant)
    twins = {
        name: other.teacache
        for name, other in FAMILIES[family].variants.items()
        if other.teacache and dict(other.denoiser) == dict(FAMILIES[family].variants[variant].denoiser)
    }
    if len(twins) == 1:
        assert TeaCache().refuses(target) is None
        assert TeaCache().bind(target).coefficients == FAMILIES[family].variants[variant].teacache
    else:
        assert "several polynomials fit" in TeaCache().refuses(target)
        assert all(name in TeaCache().refuses(target) for name in twins)


@pytest.mark.parametrize(("family", "variant"), [("wan", "2.2-ti2v-5b"), ("flux", "schnell"), ("flux", "fill")])
def test_another_model_of_the_family_has_none(family, variant):
    assert "no TeaCache polynomial is known" in TeaCache().refuses(target_of(family, variant))
    assert TeaCache(coefficients=(1.0, 0.0)).refuses(target_of(family, variant)) is None


def test_a_calibrations_polynomial(pipe, draw, last, tmp_path):
    file = tmp_path / "calibration.json"
    own = {"denoiser": fingerprint(pipe.transformer), "teacache": {"coefficients": [1.0, 0.0]}}
    file.write_text(json.dumps(own))
    draw(vivace.accelerate(pipe, cache=f"teacache:threshold=0.5,file={file}"))
    by_file = last(pipe)["skipped_steps"]
    draw(vivace.accelerate(pipe, cache="teacache:threshold=0.5,coefficients=1+0"))
    assert by_file == last(pipe)["skipped_steps"] != []
    del own["teacache"]
    file.write_text(json.dumps(own))
    with pytest.raises(InputError, match="no TeaCache polynomial"):
        vivace.accelerate(pipe, cache=f"teacache:file={file}")


def test_skips_until_the_changes_add_up(pipe, draw, last):
    """With a polynomial that is 1 everywhere, every third step is computed at a threshold of 2.5."""
    vivace.accelerate(pipe, cache="teacache:coefficients=0+1,threshold=2.5")
    draw(pipe)
    assert last(pipe)["skipped_steps"] == [1, 2, 4, 5, 7, 8, 10, 11]
    vivace.accelerate(pipe, cache="teacache:coefficients=0+1,threshold=99,warmup=3,cooldown=2,max_skips=3")
    draw(pipe)
    assert last(pipe)["skipped_steps"] == [3, 4, 5, 7, 8, 9]


def test_polynomial_is_highest_power_first():
    assert polynomial((2.0, 3.0, 5.0), 10.0) == 235.0
    assert polynomial((), 1.0) == 0.0


def test_a_signal_that_changed_infinitely_is_never_skipped():
    """Published polynomials fall steeply beyond what they were fitted to, and 0 times infinity is no number."""
    for coefficients in ((-52186.0, 9230.0, -528.0, 13.7, -0.05), (0.0, 1.0)):
        assert polynomial(coefficients, float("inf")) == float("inf")


def test_a_signal_per_sample_where_guidance_is_batched(pipe):
    """The change is the largest of any sample: two halves move differently."""
    from vivace.cache.change import relative_change

    a, b = torch.ones(2, 3, 4), torch.ones(2, 3, 4)
    b[1] += 0.5
    assert relative_change(b, a) == pytest.approx(0.5)
    assert relative_change(a, a) == 0.0
    assert relative_change(a, torch.zeros_like(a)) == float("inf")
    a[0, 0, 0] = float("nan")
    assert relative_change(a, b) == float("inf")
