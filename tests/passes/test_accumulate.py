"""Sums in 16 bit: asked for, inside the denoiser's calls only, and refused where they mean nothing."""

import threading

import pytest
import torch

import vivace
from vivace import InputError
from vivace.passes.accumulate import narrow


def allowed() -> bool:
    return torch.backends.cuda.matmul.allow_fp16_accumulation


def test_refused_where_it_means_nothing(sd3_pipe):
    with pytest.raises(InputError, match=r"accumulate='fp16'.*denoiser is on cpu"):
        vivace.accelerate(sd3_pipe, accumulate="fp16")
    with pytest.raises(InputError, match="accumulate is one of fp32, fp16"):
        vivace.Config(accumulate="fp8")


def test_goes_back_when_the_last_call_has_ended():
    assert not allowed()
    inside, leave = threading.Event(), threading.Event()

    def other():
        with narrow():
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    with narrow():
        thread.start()
        assert inside.wait(60)
        assert allowed()
    assert allowed()
    leave.set()
    thread.join()
    assert not allowed()


def test_a_user_who_set_it_keeps_it():
    torch.backends.cuda.matmul.allow_fp16_accumulation = True
    try:
        with pytest.raises(ValueError, match="x"), narrow():
            raise ValueError("x")
        assert allowed()
    finally:
        torch.backends.cuda.matmul.allow_fp16_accumulation = False


@pytest.mark.gpu
def test_on_a_gpu(sd3_pipe):
    denoiser = sd3_pipe.transformer.to("cuda", torch.float16)
    from vivace.families import FAMILIES

    inputs = FAMILIES["sd3"].inputs(denoiser, size=(64, 64), text_tokens=9)
    seen = []
    hook = denoiser.proj_out.register_forward_hook(lambda *_: seen.append(allowed()))
    try:
        with torch.no_grad():
            stock = denoiser(**inputs)[0]
            vivace.accelerate(denoiser, accumulate="fp16", fuse="off", graphs="off")
            ours = denoiser(**inputs)[0]
        assert seen == [False, True]
        assert not allowed()
        assert (ours - stock).norm() < 0.02 * stock.norm()
    finally:
        hook.remove()
        vivace.restore(denoiser)
        sd3_pipe.transformer.to("cpu", torch.float32)
