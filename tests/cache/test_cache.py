"""Every policy on real pipelines: it skips, it comes close, and with nothing to skip it is exact to the bit."""

import inspect

import pytest
import torch
from PIL import Image

import vivace
from vivace import InputError
from vivace.cache import POLICIES, parse, spell
from vivace.families import FAMILIES

STEPS = 12  # of `draw`

# One of each that skips something on a transformer, and one that skips nothing.
LOOSE = {
    "steps": "steps:compute=0-3,5,7,9,11,order=1",
    "firstblock": "firstblock:threshold=0.4",
    "teacache": "teacache:threshold=0.5,coefficients=1+0",
    "dicache": "dicache:threshold=0.5",
    "magcache": "magcache:ratios=1+1.01+1.01+0.99,threshold=0.2",
    "taylorseer": "taylorseer:interval=3",
    "meancache": "meancache:of50=17",
    "blockdance": "blockdance:after=1",
    "pab": "pab:warmup=2,cooldown=2",
    "guidance": "guidance:every=3",
}
TIGHT = {
    "steps": "steps:compute=0-11",
    "firstblock": "firstblock:threshold=0",
    "teacache": "teacache:threshold=0,coefficients=1+0",
    "dicache": "dicache:threshold=0",
    "magcache": "magcache:ratios=2+2+3,threshold=0",
    "taylorseer": "taylorseer:interval=1",
    "blockdance": "blockdance:after=1,begin=0.99,end=1",
    "pab": "pab:warmup=99",
    "guidance": "guidance:every=1",
}


def close(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize(
    ("spelled", "fuse"),
    [
        pytest.param(spelled, fuse, id=f"{name}-{fuse}")
        for name, spelled in LOOSE.items()
        for fuse in ("on", "off")
        if fuse == "off" or not parse(spelled).modules  # fused blocks call no attention modules
    ],
)
def test_skips_and_comes_close(pipe, draw, last, spelled, fuse):
    exact, rough = draw(pipe), draw(pipe, steps=4)
    vivace.accelerate(pipe, cache=spelled, fuse=fuse)
    fast, did = draw(pipe), last(pipe)
    assert did["computed"] + did["skipped"] == STEPS
    assert 1 <= did["skipped"] < STEPS
    assert 0 not in did["skipped_steps"]
    assert 0 < close(fast, exact) < close(rough, exact)
    vivace.restore(pipe)
    assert torch.equal(draw(pipe), exact)


@pytest.mark.parametrize("spelled", [*LOOSE.values(), "firstblock:threshold=0.4,order=2", "taylorseer:order=2"])
def test_memory_stays_within_the_forecast(pipe, draw, spelled):
    tokens, width = 4 * 4, pipe.transformer.inner_dim
    sizes = {"output": 2 * 16 * 8 * 8 * 4, "hidden": 2 * tokens * width * 4, "text": 2 * (77 + 256) * width * 4}
    modules = sum(
        1 for block in pipe.transformer.transformer_blocks for a in (block.attn, block.attn2) if a is not None
    )
    vivace.accelerate(pipe, cache=spelled, fuse="off")
    draw(pipe, steps=30)
    peak = vivace.report(pipe).cache["transformer"]["peak_bytes"]
    assert 0 < peak <= parse(spelled).holds.nbytes(**sizes, modules=modules)


@pytest.mark.parametrize("spelled", TIGHT.values(), ids=TIGHT)
def test_with_nothing_to_skip_nothing_changes(pipe, draw, last, spelled):
    fuse = "off" if parse(spelled).modules else "on"
    exact = draw(vivace.accelerate(pipe, fuse=fuse))
    vivace.accelerate(pipe, cache=spelled, fuse=fuse)
    assert torch.equal(draw(pipe), exact)
    assert last(pipe)["skipped"] == 0


@pytest.mark.parametrize(
    "spelled", ["deepcache", "steps:compute=0-1,3,5,7", "guidance", "taylorseer:interval=2", "pab:warmup=2,cooldown=0"]
)
def test_on_a_unet(unet_pipe, last, spelled):
    def latents(**extra):
        generator = torch.Generator().manual_seed(0)
        return unet_pipe("a fox", num_inference_steps=8, output_type="latent", generator=generator, **extra).images

    exact, rough = latents(), latents(guidance_scale=0.0)
    vivace.accelerate(unet_pipe, cache=spelled)
    try:
        fast = latents()
        assert last(unet_pipe)["skipped"] >= 3
        assert 0 < close(fast, exact) < close(rough, exact)
    finally:
        vivace.restore(unet_pipe)


@pytest.mark.parametrize("name", ["firstblock", "teacache:coefficients=1+0", "dicache", "blockdance"])
def test_a_unet_is_refused_by_what_follows_one_stream(unet_pipe, name):
    with pytest.raises(InputError, match="deepcache"):
        vivace.accelerate(unet_pipe, cache=name)


@pytest.mark.parametrize("spelled", ["firstblock:depth=3", "dicache:depth=9", "blockdance:after=3"])
def test_blocks_must_be_left_to_skip(pipe, spelled):
    with pytest.raises(InputError, match=r"leaves none of the 3 blocks to skip; give at most 2"):
        vivace.accelerate(pipe, cache=spelled)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_skips(family):
    one = FAMILIES[family]
    pipe = one.tiny()
    vivace.accelerate(pipe, cache="deepcache:interval=2" if "up_blocks" in one.blocks else "firstblock:threshold=9")
    picture = Image.new("RGB", (64, 64), "red")
    arguments = {
        "num_inference_steps": 4, "output_type": "latent", "height": 64, "width": 64, "num_frames": 5,
        "prompt": "a fox", "use_resolution_binning": False, "max_sequence_length": 16, "image": picture,
    }  # fmt: skip
    known = inspect.signature(pipe.__call__).parameters
    if "prompt" in known and family != "svd":
        del arguments["image"]
    pipe(**{name: value for name, value in arguments.items() if name in known})
    found = vivace.report(pipe).cache.values()
    assert sum(each["last_request"]["skipped"] for each in found) >= 1
    assert not any(each["idle"] for each in found)


def test_spelling_round_trip():
    for spelled in (*LOOSE.values(), "planned:computed=0.4", "deepcache:levels=2"):
        assert spell(parse(spelled)) == spelled
        assert parse(spell(parse(spelled))) == parse(spelled)
    assert parse("none") is None
    assert parse("Tea-Cache") == POLICIES["teacache"]()


@pytest.mark.parametrize(
    ("spelled", "message"),
    [
        ("teacahe", "nearest is 'teacache'"),
        ("teacache:treshold=0.1", "nearest is 'threshold'"),
        ("planned:plans=1", "has no field 'plans'"),
        ("teacache:threshold", "name=value"),
        ("teacache:threshold=high", "is a number"),
        ("firstblock:threshold=-1", "from 0 on"),
        ("firstblock:warmup=0", "from 1 on"),
        ("steps", "no list of steps"),
        ("meancache:of50=20", "10, 17, 25, 30|30, 25, 17, 10"),
        ("firstblock:order=3", "order is a whole number from 0 to 2, got 3"),
        ("taylorseer:order=9", "from 0 to 2"),
        ("steps:compute=0,order=3", "from 0 to 2"),
        ("steps:compute=9-3", "goes from 9 to 3"),
        (f"steps:compute=0-{'9' * 5000}", "names step 9+; the last that a run may have is 9999"),
        (f"firstblock:order={'9' * 400}", "order is a whole number from 0 to 2, got 9+"),
        ("guidance:begin=0.8,end=0.3", "no step with guidance"),
        ("guidance:end=5", "from 0 to 1"),
        ("blockdance:begin=0.8,end=0.3", "no step to reuse"),
        ("firstblock:threshold=0.1,order=1,threshold=0.2", "firstblock: threshold is given twice"),
        ("dicache:retain=7", "from 0 to 1"),
        ("planned:computed=7", "from 0 to 1"),
    ],
)
def test_what_cannot_be_is_said(spelled, message):
    with pytest.raises(InputError, match=message):
        vivace.Config(cache=spelled)


@pytest.mark.parametrize(
    ("policy", "fields"),
    [
        ("teacache", {"coefficients": "abc"}),
        ("teacache", {"coefficients": (float("nan"),)}),
        ("teacache", {"coefficients": ()}),
        ("magcache", {"ratios": (1, "a")}),
        ("steps", {"compute": [1, 2]}),
        ("planned", {"file": 3}),
        ("firstblock", {"threshold": True}),
    ],
)
def test_what_is_no_value_is_said(policy, fields):
    (name,) = fields
    with pytest.raises(InputError, match=f"{policy}: {name} is "):
        POLICIES[policy](**fields)


@pytest.mark.parametrize(
    ("family", "pipeline", "message"),
    [
        ("z_image", "ZImagePipeline", "halves as lists"),
        ("sd", "StableDiffusionInstructPix2PixPipeline", "three thirds"),
        ("flux", "FluxImg2ImgPipeline", "does not say which of its calls"),
        ("wan", "WanVideoToVideoPipeline", "does not say which of its calls"),
        ("lcm", "LatentConsistencyModelPipeline", "computes no unconditional half"),
        ("flux2", "Flux2Pipeline", "computes no unconditional half"),
    ],
)
def test_guidance_is_refused_where_its_halves_cannot_be_told(family, pipeline, message):
    pipe = FAMILIES[family].tiny(pipeline)
    with pytest.raises(InputError, match=message):
        vivace.accelerate(pipe, cache="guidance:every=2")


@pytest.mark.parametrize(
    ("family", "pipeline"),
    [
        ("flux", "FluxPipeline"),
        ("wan", "WanPipeline"),
        ("flux2", "Flux2KleinPipeline"),
        ("qwen_image", "QwenImageImg2ImgPipeline"),
        ("sdxl", "StableDiffusionXLPipeline"),
    ],
)
def test_guidance_is_taken_where_the_loop_names_its_halves(family, pipeline):
    pipe = FAMILIES[family].tiny(pipeline)
    for _ in range(2):  # the second time over a class that is ours
        vivace.accelerate(pipe, cache="guidance:every=2")


@pytest.mark.parametrize("policy", ["firstblock", "dicache:retain=0", "teacache:coefficients=1+0"])
def test_of_the_first_steps_one_in_so_many_is_computed(pipe, draw, last, policy):
    separator = "," if ":" in policy else ":"
    vivace.accelerate(pipe, cache=f"{policy}{separator}threshold=99,warmup=6,warmup_every=2")
    draw(pipe)
    assert last(pipe)["skipped_steps"] == [1, 3, 5, *range(6, STEPS)]


@pytest.mark.parametrize("spelled", ["taylorseer:interval=2", "meancache", "steps:compute=0-3,5,7", "dicache"])
def test_keys_and_values_that_a_call_hands_out_are_none_of_the_caches(spelled, last):
    pipe = FAMILIES["flux2"].tiny("Flux2KleinKVPipeline")
    vivace.accelerate(pipe, cache=spelled)
    picture = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    pipe(prompt="a fox", image=picture, height=64, width=64, num_inference_steps=12, output_type="latent")
    assert last(pipe)["skipped"] > 0
