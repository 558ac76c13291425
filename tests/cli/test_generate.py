"""`vivace generate` from end to end, on a random model of the built-in one's class."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from vivace import cli
from vivace.cli.generate import quiet
from vivace.families import FAMILIES

PROMPT = "a small red circle"
LONG = "x" * 300  # no file system takes such a name


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "sd3"
    FAMILIES["sd3"].tiny().save_pretrained(folder)
    (folder / "vivace.json").write_text('{"steps": 2, "guidance": 3.0, "size": [64, 64], "longest": 64}')
    return folder


@pytest.fixture
def room(tmp_path, monkeypatch):
    """An empty working folder; the inputs lie elsewhere."""
    (tmp_path / "room").mkdir()
    monkeypatch.chdir(tmp_path / "room")
    Image.new("RGB", (200, 160), "red").save(tmp_path / "in.png")
    Image.new("L", (200, 160), 255).save(tmp_path / "mask.png")
    Image.new("RGB", (3, 300)).save(tmp_path / "thin.png")
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "plain.txt").write_text("not a picture")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "model.ckpt")
    save_file({"weight": torch.zeros(100)}, tmp_path / "odd.safetensors")
    whole = (tmp_path / "odd.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-40])
    return tmp_path / "room"


def generate(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(["generate", *map(str, arguments)])
    return end.value.code


def pixels(path: Path) -> bytes:
    return Image.open(path).tobytes()


def test_a_process_writes_a_picture_and_one_line_of_json(room, model):
    command = [sys.executable, "-m", "vivace", "generate", PROMPT, "--model", str(model), "--seed", "7", "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.count("\n") == 1
    said = json.loads(ended.stdout)
    assert (said["paths"], said["seed"], said["steps"], said["size"]) == (["out.png"], 7, 2, [64, 64])
    assert said["applied"]["guidance_scale"] == 3.0
    assert said["timings"].keys() == {"load_s", "generate_s", "total_s"}
    assert Image.open("out.png").size == (64, 64)


def test_the_same_seed_gives_the_same_pixels_and_each_of_count_can_be_made_alone(room, model, capsys):
    assert generate(PROMPT, "--model", model, "--seed", 5, "--count", 3, "--json") == 0
    made = json.loads(capsys.readouterr().out)["pictures"]
    assert [(one["path"], one["seed"]) for one in made] == [("out-1.png", 5), ("out-2.png", 6), ("out-3.png", 7)]
    assert generate(PROMPT, "--model", model, "--seed", 6, "-o", "again.png") == 0
    assert pixels(Path("again.png")) == pixels(Path("out-2.png")) != pixels(Path("out-1.png"))


def test_a_preset_is_applied_and_said(room, model, capsys):
    options = (PROMPT, "--model", model, "--seed", 5, "--json", "--overwrite")
    assert generate(*options) == 0
    stock = json.loads(capsys.readouterr().out)
    assert stock["report"] is None
    assert generate(*options, "--preset", "exact", "-o", "fast.png") == 0
    fast = json.loads(capsys.readouterr().out)
    assert fast["applied"]["preset"] == "exact"
    assert fast["report"]["calls"]["transformer"].keys() == {"fused blocks"}
    assert generate(*options, "--set", "fuse=off", "--set", "attention=native", "-o", "odd.png") == 0
    odd = json.loads(capsys.readouterr().out)
    assert (odd["applied"]["preset"], odd["applied"]["config"]["fuse"]) == ("custom", "off")
    assert odd["report"]["calls"]["transformer"].keys() == {"stock blocks"}
    assert pixels(Path("odd.png")) == pixels(Path("out.png"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--preset", "fats"), "unknown preset 'fats'; the nearest is 'fast'"),
        (("--set", "fuse"), "--set takes FIELD=VALUE, got 'fuse'"),
        (("--set", "graphs=on"), "graphs='on' cannot be done here"),
    ],
)
def test_a_wrong_preset_or_field_is_one_line(room, model, capsys, arguments, said):
    assert generate(PROMPT, "--model", model, "--device", "cpu", *arguments) == 2
    caught = capsys.readouterr()
    assert (caught.out, caught.err.count("\n")) == ("", 1)
    assert said in caught.err
    assert not Path("out.png").exists()


def test_a_drawn_seed_is_reported_and_makes_the_picture_again(room, model, capsys):
    assert generate(PROMPT, "--model", model, "--json") == 0
    seed = json.loads(capsys.readouterr().out)["seed"]
    before = Path("out.png").read_bytes()
    assert generate(PROMPT, "--model", model, "--seed", seed, "--overwrite") == 0
    assert Path("out.png").read_bytes() == before


def test_prompts_from_a_file(room, model, capsys):
    Path("../prompts.txt").write_text("a red circle\n\na blue square\n")
    assert generate("--prompts", "../prompts.txt", "--model", model, "--seed", 1, "--json") == 0
    made = json.loads(capsys.readouterr().out)["pictures"]
    assert [(one["prompt"], one["seed"]) for one in made] == [("a red circle", 1), ("a blue square", 1)]


@pytest.mark.parametrize(
    ("arguments", "pipeline", "size"),
    [
        (("--image", "../in.png", "--strength", "0.5"), "StableDiffusion3Img2ImgPipeline", [64, 64]),
        (
            ("--image", "../in.png", "--mask", "../mask.png", "--size", "64x32"),
            "StableDiffusion3InpaintPipeline",
            [64, 32],
        ),
        (("--negative", "blue", "--guidance", "2", "--scheduler", "heun"), "StableDiffusion3Pipeline", [64, 64]),
        (("--call-kwargs", '{"skip_guidance_layers": [0]}'), "StableDiffusion3Pipeline", [64, 64]),
    ],
)
def test_inputs_pick_the_stock_class(room, model, capsys, arguments, pipeline, size):
    assert generate(PROMPT, "--model", model, "--steps", 2, "--json", *arguments) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["applied"]["pipeline"], said["size"]) == (
        pipeline,
        size if "--image" not in arguments[:1] else said["size"],
    )


def test_a_step_cache_says_what_it_skipped(room, model, capsys):
    arguments = ("--model", model, "--steps", 6, "--seed", 1, "--json")
    assert generate(PROMPT, *arguments, "--cache", "steps:compute=0-2,4") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["cache"]["transformer"]["last_request"]["skipped_steps"] == [3, 5]
    assert said["applied"]["cache"] == "steps:compute=0-2,4"


def test_a_long_prompt_is_cut_with_a_warning(room, model, capsys):
    long = "a red circle above a blue square " * 300
    assert generate(f"{long} and a green star", "--model", model, "--steps", 1) == 0
    said = capsys.readouterr().err.splitlines()
    assert all(line.startswith("vivace: warning: the prompt is longer than the ") for line in said)
    assert said
    assert "and a green star" in said[0]


BAD = {
    "unknown model": (("--model", "builtni"), "unknown model"),
    "missing folder": (("--model", "./none"), "no model at"),
    "no pipeline": (("--model", "../folder"), "is not a pipeline folder"),
    "pickle": (("--model", "../model.ckpt"), "pickle checkpoint, refused"),
    "truncated": (("--model", "../cut.safetensors"), "truncated"),
    "not a model": (("--model", "../odd.safetensors"), "no whole model in its original layout"),
    "steps": (("--steps", "0"), "--steps is 0"),
    "cache": (("--cache", "teacahe"), "the nearest is 'teacache'"),
    "cache that cannot": (("--cache", "deepcache"), "needs a UNet"),
    "size": (("--size", "62x64"), "multiples of 16; the nearest is 64x64"),
    "size text": (("--size", "64"), "not WxH"),
    "huge size": (("--size", "64x1000000"), "from 1 to 16384"),
    "no picture": (("--image", "../none.png"), "no picture"),
    "text as picture": (("--image", "../plain.txt"), "not a picture"),
    "absurd picture": (("--image", "../thin.png"), "sides of at least 8"),
    "two pictures": (("--image", "../in.png", "--image", "../in.png"), "takes one --image; 2 were given"),
    "mask alone": (("--mask", "../mask.png"), "--mask needs --image"),
    "strength": (("--image", "../in.png", "--strength", "1.5"), "above 0 and at most 1"),
    "no step left": (("--image", "../in.png", "--strength", "0.1"), "leaves none"),
    "control alone": (("--control-image", "../in.png"), "needs --controlnet"),
    "family flag": (("--true-cfg", "3"), "does not take --true-cfg"),
    "video flag": (("--frames", "8"), "does not take --frames"),
    "unwritable": (("-o", "/proc/out.png"), "cannot write into /proc"),
    "no such folder": (("-o", "none/out.png"), "cannot write into none"),
    "a folder": (("-o", "../folder"), "is a folder"),
    "a jpeg": (("-o", "out.jpg"), "does not end in .png, which a picture is written as; give -o out.png"),
    "long output": (("-o", f"{LONG}.png"), "File name too long; give another -o"),
    "long model": (("--model", LONG), "unknown model"),
    "long path": (("--model", f"./{LONG}"), "no model at"),
    "long picture": (("--image", LONG), "no picture"),
    "long lora": (("--lora", LONG), "no weight file"),
    "long prompts": (("--prompts", LONG), "cannot be read as text"),
    "long control model": (("--control-image", "../in.png", "--controlnet", LONG), "is not a ControlNet's folder"),
    "no model named": (("--model", ""), "no model is named; give builtin"),
    "too large": (("--size", "128x64"), "the longest side of"),
    "guidance": (("--guidance", "1e30"), "--guidance is 1e+30; it has to be from 0 to 1000"),
    "infinite guidance": (("--guidance", "inf"), "from 0 to 1000"),
    "no number": (("--guidance", "nan"), "from 0 to 1000"),
    "huge seed": (("--seed", 2**63), f"it has to be from 0 to {2**63 - 1}"),
    "exists": (("-o", "../in.png"), "exists; give --overwrite"),
    "empty prompts": (("--prompts", "../empty.txt"), "holds no prompt"),
    "scheduler": (("--scheduler", "eular"), "nearest are EulerDiscreteScheduler"),
    "dtype": (("--dtype", "int4"), "no dtype 'int4'"),
    "device": (("--device", "gpu"), "no device 'gpu'"),
    "absent device": (("--device", "cuda:99"), "no device cuda:99"),
    "lora": (("--lora", "../model.ckpt"), "pickle"),
    "foreign lora": (("--lora", "../odd.safetensors:0.5"), "does not fit"),
    "lora weight": (("--lora", "../odd.safetensors:x"), "'x' is not a number"),
    "no json": (("--call-kwargs", "{eta:1}"), "not JSON"),
    "unknown argument": (
        ("--call-kwargs", '{"guidance_scal": 1}'),
        "the nearest is guidance_scale (which is --guidance)",
    ),
    "decided argument": (("--call-kwargs", '{"output_type": "np"}'), "cannot set output_type: vivace decides it"),
    **{
        f"the flag's {name}": (("--call-kwargs", json.dumps({name: value})), f"cannot set {name}; give {flag} instead")
        for name, value, flag in (
            ("generator", 1, "--seed"),
            ("num_inference_steps", 0, "--steps"),
            ("num_images_per_prompt", 3, "--count"),
            ("prompt", ["a", "b"], "PROMPT"),
            ("height", "x", "--size"),
            ("guidance_scale", None, "--guidance"),
            ("negative_prompt", 1, "--negative"),
        )
    },
    "no steps": (("--call-kwargs", '{"sigmas": []}'), "sigmas of --call-kwargs leave no step to do"),
    "latents": (("--call-kwargs", '{"latents": [1]}'), "cannot run with latents of --call-kwargs: AttributeError"),
    "two prompts": (("--call-kwargs", '{"prompt_2": ["a", "b"]}'), "cannot run with prompt_2 of --call-kwargs"),
    "length": (("--call-kwargs", '{"max_sequence_length": "x"}'), "max_sequence_length of --call-kwargs: TypeError"),
    "seed": (("--seed", "-1"), "--seed is -1"),
    "count": (("--count", "0"), "--count is 0"),
}


@pytest.mark.parametrize(("arguments", "said"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_changes_nothing(room, model, capsys, arguments, said):
    given = () if "--prompts" in arguments else (PROMPT,)
    own = () if "--model" in arguments else ("--model", model)
    before = {path: path.read_bytes() for path in room.parent.rglob("*") if path.is_file()}
    assert generate(*given, *own, *arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("vivace: ")
    assert said in err
    assert {path: path.read_bytes() for path in room.parent.rglob("*") if path.is_file()} == before


def test_no_prompt(room, model, capsys):
    assert generate("--model", model) == 2
    assert "needs a prompt" in capsys.readouterr().err
    assert generate("  ", "--model", model) == 2
    assert "an empty prompt" in capsys.readouterr().err


def test_a_pipeline_folder_with_a_cut_file(room, model, tmp_path, capsys):
    folder = tmp_path / "copy"
    FAMILIES["sd3"].tiny().save_pretrained(folder)
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert generate(PROMPT, "--model", folder) == 2
    assert "truncated" in capsys.readouterr().err


def test_the_longest_name_is_written(room, model):
    name = "ä" * 125 + ".png"  # 254 bytes of the 255
    assert generate(PROMPT, "--model", model, "--steps", 1, "-o", name) == 0
    assert [path.name for path in room.iterdir()] == [name]


def test_a_folder_without_all_its_components(room, model, tmp_path, capsys):
    index = json.loads((model / "model_index.json").read_text())
    kept = {key: value for key, value in index.items() if key in ("_class_name", "vae", "scheduler")}
    for name in ("vae", "scheduler"):
        shutil.copytree(model / name, tmp_path / "part" / name)
    (tmp_path / "part" / "model_index.json").write_text(json.dumps(kept))
    assert generate(PROMPT, "--model", tmp_path / "part") == 2
    said = capsys.readouterr().err
    assert "is not complete: model_index.json does not list text_encoder, " in said
    assert "transformer" in said
    assert said.count("\n") == 1


def test_ctrl_c_leaves_nothing_half_written(room, model, monkeypatch):
    from diffusers import StableDiffusion3Pipeline

    monkeypatch.setattr(
        StableDiffusion3Pipeline, "encode_prompt", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    assert generate(PROMPT, "--model", model) == 130
    assert list(room.iterdir()) == []


def test_what_a_library_logs_is_not_shown_beside_our_line():
    with quiet():
        for name in ("diffusers.models", "transformers.modeling_utils", "huggingface_hub.file_download"):
            assert not logging.getLogger(name).isEnabledFor(logging.ERROR)
        assert logging.getLogger("vivace").isEnabledFor(logging.WARNING)
