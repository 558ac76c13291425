"""Which backend is chosen, and how fp8 reaches the fused blocks of a whole pipeline."""

from dataclasses import replace

import pytest
import torch

import vivace
from vivace import PRESETS, InputError, request
from vivace.attention import cudnn_fp8
from vivace.attention.native import NATIVE
from vivace.families import FAMILIES
from vivace.passes import attention


def line(subject) -> str:
    return next(note.detail for note in vivace.report(subject).passes if note.name == "attention")


@pytest.fixture
def here(emulated_fp8, monkeypatch):
    """The fp8 backend as if the CPU were a GPU on which heads of 8 gain, and the steps at which it computed."""
    steps = []

    def heads(operands, *, scale=None):
        now = request.current()
        steps.append(now and now.step)
        return cudnn_fp8.attend_packed(operands, scale=scale)

    monkeypatch.setattr(cudnn_fp8, "KEYS", 8)
    serves = lambda *, keys, depth, mask: mask is None and keys >= 8  # noqa: E731
    backend = replace(
        cudnn_fp8.CUDNN_FP8,
        attend=replace(cudnn_fp8.CUDNN_FP8.attend, serves=serves, heads=heads),
        devices=NATIVE.devices, dtypes=NATIVE.dtypes, package=None,
    )  # fmt: skip
    monkeypatch.setattr(attention, "CUDNN_FP8", backend)
    monkeypatch.setattr(attention, "where_it_wins", lambda device: backend)
    return steps


@pytest.mark.parametrize("fuse", ["auto", "off"])
def test_fast_is_fp8_between_two_steps_at_each_end(here, fuse):
    pipe = FAMILIES["flux"].tiny()

    def latents():
        options = {"height": 64, "width": 64, "max_sequence_length": 16, "num_inference_steps": 6}
        return pipe("a frog", **options, generator=torch.Generator().manual_seed(1), output_type="latent").images

    stock = latents()
    vivace.accelerate(pipe, "fast", fuse=fuse)
    assert "native in the first and last 2 steps" in line(pipe)
    drawn = latents()
    # Stock blocks hand it 16 bit, which it packs itself.
    assert set(here) == ({2, 3} if fuse == "auto" else set())
    assert 1e-5 < (drawn - stock).norm() / stock.norm() < 0.1
    assert torch.equal((vivace.restore(pipe), latents())[1], stock)


def test_norms_that_change_in_place_are_seen(here):
    denoiser = FAMILIES["flux"].tiny().transformer
    arguments = FAMILIES["flux"].inputs(denoiser, size=(64, 64), text_tokens=8)

    def called():
        with torch.no_grad():
            return denoiser(**arguments)[0]

    vivace.accelerate(denoiser, "fast", exact_ends=0)
    before = called()
    state = denoiser.state_dict()
    state["single_transformer_blocks.0.attn.norm_q.weight"] *= 9
    denoiser.load_state_dict(state)
    after = called()
    assert not torch.equal(after, before)
    vivace.accelerate(vivace.restore(denoiser), "fast", exact_ends=0)
    assert torch.equal(called(), after)


@pytest.mark.parametrize("fuse", ["auto", "off"])
def test_a_mask_is_never_dropped(fuse, monkeypatch):
    """Of backends that take none, such as flash."""
    plain = lambda q, k, v, *, mask=None, scale=None: NATIVE.attend(q, k, v, scale=scale)  # noqa: E731
    backend = replace(NATIVE, name="flash", attend=plain, masks=False)
    monkeypatch.setattr(attention, "_named", lambda config: backend)
    family = FAMILIES["qwen_image"]
    denoiser = vivace.accelerate(family.tiny().transformer, fuse=fuse, attention="flash")
    arguments = family.inputs(denoiser, size=(32, 32), batch=2, frames=1, text_tokens=4)
    gaps = {"encoder_hidden_states_mask": torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]])}
    with torch.no_grad():
        assert denoiser(**arguments)[0].isfinite().all()
        with pytest.raises(InputError, match="attention='flash' cannot do a call of this model: it asks for a mask"):
            denoiser(**arguments | gaps)


def test_a_bare_denoiser_has_no_ends(sd3_pipe, here):
    vivace.accelerate(sd3_pipe.transformer, "fast")
    assert "a bare denoiser has no first and last steps" in line(sd3_pipe.transformer)
    vivace.accelerate(sd3_pipe.transformer, "fast", exact_ends=0)
    assert line(sd3_pipe.transformer).startswith("cudnn_fp8")


def test_fast_on_a_cpu_says_why_it_is_balanced(sd3_pipe, sd3_latents):
    stock = sd3_latents(vivace.accelerate(sd3_pipe, "balanced"))
    assert torch.equal(sd3_latents(vivace.accelerate(sd3_pipe, "fast")), stock)
    assert "no fp8: it is not for cpu" in line(sd3_pipe)
    assert "native" in line(sd3_pipe)
    with pytest.raises(InputError, match="attention='cudnn_fp8' cannot be done here"):
        vivace.accelerate(sd3_pipe, attention="cudnn_fp8")


@pytest.mark.parametrize(("sm", "depths"), [((9, 0), {128}), ((8, 9), None), ((12, 0), None)])
def test_where_fp8_is_measured_to_win(sm, depths, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: sm)
    backend = cudnn_fp8.where_it_wins(torch.device("cuda"))
    assert cudnn_fp8.where_it_wins(torch.device("cpu")) is None
    if depths is None:
        assert backend is None
        return
    sizes = range(16, 257, 16)
    assert {d for d in sizes if backend.attend.serves(keys=4096, depth=d, mask=None)} == depths
    assert not backend.attend.serves(keys=512, depth=128, mask=None)
    assert "917" in backend.leaves


def test_presets_stand_in_order():
    assert list(PRESETS) == ["exact", "balanced", "fast"]
    assert replace(PRESETS["fast"], attention="auto", exact_ends=0) == PRESETS["balanced"]
