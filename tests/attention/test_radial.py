"""Radial attention is dense attention under its mask, every key counted once."""

import pytest
import torch

import vivace
from vivace import InputError, request
from vivace.accelerate import acceleration_of
from vivace.attention.native import NATIVE
from vivace.attention.radial import CHUNK, RADIAL, Pattern, attend_pattern, pattern_of
from vivace.attention.space_time import SPACE_TIME, SpaceTime
from vivace.families import FAMILIES


def mask_of(pattern: Pattern) -> torch.Tensor:
    """[S, S] which keys a query sees, from the definition: its chunk, its band, the first frame."""
    numbers = torch.arange(pattern.frames * pattern.tokens)
    frame, token = numbers // pattern.tokens, numbers % pattern.tokens
    chunk = (frame + (CHUNK - CHUNK // 2 if pattern.shifted else 0)) // CHUNK
    band = (token - (pattern.band // 2 if pattern.shifted else 0)) % pattern.tokens // pattern.band
    same = [x[:, None] == x[None, :] for x in (chunk, band)]
    return same[0] | same[1] | (frame == 0)[None, :]


def heads(*shape: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*shape, generator=generator) * 2 for _ in range(3))


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("frames", "tokens", "bands"), [(6, 12, 3), (7, 20, 5), (13, 8, 4)])
def test_is_dense_attention_under_its_mask(frames, tokens, bands, shifted):
    pattern = Pattern(frames, tokens, bands, shifted)
    q, k, v = heads(2, frames * tokens, 3, 16)
    expected = NATIVE.attend(q, k, v, mask=mask_of(pattern))
    torch.testing.assert_close(attend_pattern(q, k, v, pattern=pattern), expected, rtol=1e-4, atol=1e-5)


def test_scale():
    pattern = Pattern(6, 12, 3, shifted=False)
    q, k, v = heads(1, 72, 2, 16)
    expected = NATIVE.attend(q, k, v, mask=mask_of(pattern), scale=0.1)
    torch.testing.assert_close(attend_pattern(q, k, v, pattern=pattern, scale=0.1), expected, rtol=1e-4, atol=1e-5)


def test_share_counts_the_pairs():
    """Inclusion and exclusion compute each overlap once more; less these, the share is the mask's."""
    pattern = Pattern(12, 24, 6, shifted=False)
    near, sink = CHUNK / 12, 1 / 12
    computed = near + 1 / 6 + near / 6 + sink + sink / 6
    assert pattern.share == pytest.approx(computed)
    assert mask_of(pattern).float().mean() < pattern.share < 1


def test_wan_480p_saves_two_thirds():
    for layer in (1, 2):
        pattern = pattern_of(frames=21, tokens=30 * 52, layer=layer)
        assert pattern is not None
        assert pattern.share < 0.45
    assert pattern_of(frames=1, tokens=4096, layer=1) is None


def test_layers_alternate_and_the_first_looks_everywhere():
    q, k, v = heads(1, 12 * 24, 2, 16)
    dense = NATIVE.attend(q, k, v)
    there, layer = SPACE_TIME.set(SpaceTime(12, 24)), request.LAYER.set("blocks.0")
    try:
        assert torch.equal(RADIAL.attend(q, k, v), dense)
        made = []
        for name in ("blocks.1", "blocks.2", "blocks.3"):
            request.LAYER.set(name)
            made.append(RADIAL.attend(q, k, v))
        assert torch.equal(made[0], made[2])
        assert not torch.allclose(made[0], made[1], atol=1e-3)
        # Text is not in space and time.
        assert torch.equal(RADIAL.attend(q, k[:, :7], v[:, :7]), NATIVE.attend(q, k[:, :7], v[:, :7]))
    finally:
        request.LAYER.reset(layer)
        SPACE_TIME.reset(there)


@pytest.mark.parametrize("fuse", ["auto", "off"])
def test_a_video_model_takes_it(fuse):
    """37 latent frames of 4 x 4 tokens: the second layer is sparse, and the report says what is not."""
    pipe = FAMILIES["wan"].tiny()
    expert = pipe.transformer
    inputs = FAMILIES["wan"].inputs(expert, size=(64, 64), frames=145, text_tokens=8)
    with torch.no_grad():
        dense = expert(**inputs)[0]
        vivace.accelerate(expert, attention="radial", fuse=fuse)
        sparse = expert(**inputs)[0]
        assert torch.equal(expert(**inputs)[0], sparse)
        (lane,) = acceleration_of(expert).target.lanes.values()
        assert [*lane.calls] == ["fused blocks" if fuse == "auto" else "stock blocks"]
        line = next(note.detail for note in vivace.report(expert).passes if note.name == "attention")
        vivace.restore(expert)
        assert torch.equal(expert(**inputs)[0], dense)
    assert not torch.allclose(sparse, dense, atol=1e-4)
    assert torch.nn.functional.cosine_similarity(sparse.flatten(), dense.flatten(), dim=0) > 0.99
    assert "radial (not exact; " in line


def test_the_first_quarter_of_the_steps_looks_everywhere(monkeypatch):
    seen = []

    def attend(*given, **named):
        seen.append(request.current().step)
        return attend_pattern(*given, **named)

    monkeypatch.setattr("vivace.attention.radial.attend_pattern", attend)
    pipe = FAMILIES["wan"].tiny()
    pipe.set_progress_bar_config(disable=True)
    vivace.accelerate(pipe, attention="radial", fuse="off")
    call = {"height": 64, "width": 64, "num_frames": 57, "output_type": "latent", "max_sequence_length": 16}
    pipe("a fox", num_inference_steps=5, **call)
    assert set(seen) == {2, 3, 4}
    line = next(note.detail for note in vivace.report(pipe).passes if note.name == "attention")
    assert "the first quarter of the steps" in line


def test_refused_for_pictures(sd3_pipe):
    with pytest.raises(InputError, match=r"it is for videos.* use attention='native'"):
        vivace.accelerate(sd3_pipe, attention="radial")


@pytest.mark.gpu
@pytest.mark.parametrize("shifted", [False, True])
def test_on_a_gpu(shifted):
    pattern = Pattern(21, 15 * 26, 5, shifted)
    q, k, v = (x.to("cuda", torch.bfloat16) for x in heads(1, 21 * 15 * 26, 4, 128))
    mask = mask_of(pattern).cuda()
    expected = NATIVE.attend(q.float(), k.float(), v.float(), mask=mask)
    got = attend_pattern(q, k, v, pattern=pattern).float()
    rounded = NATIVE.attend(q, k, v, mask=mask).float()
    assert (got - expected).norm() <= 1.5 * (rounded - expected).norm()
