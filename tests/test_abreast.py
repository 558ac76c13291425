"""Pieces beside one another: what they make, and that none reads or writes what another still needs."""

from functools import partial

import pytest
import torch

import vivace
from vivace.abreast import abreast, recorded_abreast
from vivace.errors import InputError
from vivace.families import FAMILIES


def test_outside_of_a_recording_one_follows_the_other():
    order = []

    def piece(number):
        order.append(number)
        return -number

    assert abreast([partial(piece, number) for number in (1, 2, 3)]) == [-1, -2, -3]
    assert order == [1, 2, 3]


def test_a_single_piece_needs_no_stream():
    with recorded_abreast(True):
        assert abreast([lambda: 7]) == [7]


def test_without_graphs_it_is_refused():
    pipe = FAMILIES["flux"].tiny()
    with pytest.raises(InputError, match=r"streams='on'.* it is for CUDA graphs: CUDA graphs need a CUDA device"):
        vivace.accelerate(pipe, streams="on")


def test_a_unet_has_nothing_beside_something_else():
    pipe = FAMILIES["sd"].tiny()
    with pytest.raises(InputError, match="nothing in its blocks stands beside something else"):
        vivace.accelerate(pipe, streams="on")


@pytest.mark.gpu
def test_a_recording_makes_the_same_side_by_side():
    """Long chains of products over memory that is given back and taken again at every step."""
    weights = [torch.randn(512, 512, device="cuda") / 23 for _ in range(3)]

    def chain(x, weight):
        for _ in range(20):
            x = torch.relu(x @ weight) + x / 2
        return x

    def block(xs):
        return abreast([partial(chain, x, weight) for x, weight in zip(xs, weights, strict=True)])

    def forward(xs):
        for _ in range(5):
            xs = block([x / x.norm() for x in xs])
        return xs

    given = [torch.randn(rows, 512, device="cuda") for rows in (4096, 256, 64)]
    expected = forward(given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), recorded_abreast(True):
        made = forward(given)
    for _ in range(20):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flux", "sd3", "qwen_image", "flux2"])
def test_joint_blocks_make_the_same_side_by_side(name):
    family = FAMILIES[name]
    made = {}
    for streams in ("off", "on"):
        denoiser = getattr(family.tiny(), family.denoisers[0]).to("cuda", torch.bfloat16)
        inputs = family.inputs(denoiser, size=(128, 128), batch=2, text_tokens=16, seed=0)
        vivace.accelerate(denoiser, graphs="on", streams=streams)
        with torch.no_grad():
            made[streams] = [denoiser(**inputs, return_dict=False)[0].clone() for _ in range(4)]
    assert all(torch.equal(a, b) for a, b in zip(made["off"], made["on"], strict=True))
