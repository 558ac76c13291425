"""Configs as YAML: every ready one is right, and what is wrong is named."""

import dataclasses
import subprocess
import sys

import pytest

from vivace.distill.reading import RECIPES, from_dict, read_config
from vivace.errors import InputError
from vivace.families import FAMILIES
from vivace.family import family_of

READY = sorted(path.stem for path in RECIPES.glob("*.yaml"))
LEAST = {"output": "o", "stages": [{"batches": 1}], "data": {"kind": "builtin"}}


@pytest.mark.parametrize("name", READY)
def test_ready_configs_are_right(name):
    config = read_config(name)
    assert config.output == f"runs/{name}"
    assert from_dict(config.to_dict()) == config
    for stage in config.stages:
        assert config.timesteps != "modes" or stage.steps % len(stage.modes) == 0
    if config.teacher != "builtin":
        known = {variant.hub_id for family in FAMILIES.values() for variant in family.variants.values()}
        assert config.teacher in known
    if config.pipeline is not None:
        family_of(config.pipeline)
        assert {one.argument for one in config.conditioners} <= {"image", "mask_image"}


def test_consistency_follows_a_running_mean_in_ready_configs():
    """Without one its target is the latest weights, and on the built-in model it ran after itself to nothing."""
    found = [read_config(name) for name in READY]
    assert [config.student.ema is not None for config in found if config.method == "consistency"] == [True]


def test_every_backbone_has_a_ready_config():
    assert {"builtin", "sd15", "sdxl", "pixart", "sd3", "flux", "sdxl-adapter", "sdxl-controlnet"} <= set(READY)


@pytest.mark.parametrize("name", READY)
def test_targets_of_ready_configs_are_modules(name):
    """Every target of a ready config is the end of some module's name, at true size."""
    import torch
    from accelerate import init_empty_weights

    config = read_config(name)
    if config.teacher == "builtin":
        family, variant = FAMILIES["sd3"], FAMILIES["sd3"].variant("3.5-medium")
    else:
        pairs = [(family, variant) for family in FAMILIES.values() for variant in family.variants.values()]
        family, variant = next((f, v) for f, v in pairs if v.hub_id == config.teacher)
    import diffusers

    with init_empty_weights(), torch.device("meta"):
        denoiser = getattr(diffusers, family.denoiser_class)(**variant.denoiser)
    linear = [name for name, module in denoiser.named_modules() if isinstance(module, torch.nn.Linear)]
    for target in config.student.targets:
        assert any(f".{name}".endswith(f".{target}") for name in linear), target


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"teachr": "x"}, "unknown key teachr; the nearest is teacher"),
        ({"student": {"rnk": 4}}, r"unknown key student\.rnk; the nearest is student\.rank"),
        ({"stages": [{"batches": 1, "step": 4}]}, r"unknown key stages\[0\]\.step; the nearest is stages\[0\]\.steps"),
        ({"stages": [{"steps": 4}]}, r"stages\[0\]\.batches is missing"),
        ({"stages": 3}, "stages is 3; it takes a list"),
        ({"student": 3}, "student holds 3; it takes keys such as kind"),
        ({"batch": "four"}, "batch is 'four'; it takes a whole number"),
        ({"batch": True}, "batch is True; it takes a whole number"),
        ({"optimizer": {"lr": "1e-5"}}, r"optimizer\.lr is '1e-5'; it takes a number .*written 1\.0e-5"),
        ({"distance": "l3"}, "distance is 'l3'; it is one of l2, l1, huber"),
        ({"size": [64]}, r"size is \[64\]; it takes 2 values"),
        ({"teacher": None}, "teacher is None; it takes text"),
    ],
)
def test_what_is_wrong_is_named(values, said):
    with pytest.raises(InputError, match=said):
        from_dict({**LEAST, **values})


def test_files(tmp_path):
    with pytest.raises(InputError, match="no config nothing; give a YAML file, or one of builtin, "):
        read_config("nothing")
    path = tmp_path / "c.yaml"
    path.write_text("a: [unclosed")
    with pytest.raises(InputError, match="not YAML"):
        read_config(path)
    path.write_text("just text")
    with pytest.raises(InputError, match="holds no keys"):
        read_config(path)
    path.write_text("output: !!python/object/apply:os.getcwd []")
    with pytest.raises(InputError, match="not YAML"):
        read_config(path)


def test_assignments():
    config = read_config("sdxl", assignments=["student.rank=16", "stages[1].matching=0", "records.steps=[4, 2]"])
    assert (config.student.rank, config.stages[1].matching, config.records.steps) == (16, 0.0, (4, 2))
    assert dataclasses.replace(config.stages[0]) == read_config("sdxl").stages[0]
    for wrong, said in (
        ("student.rank", "takes KEY=VALUE"),
        ("stages[9].steps=4", "names nothing"),
        ("studnt.rank=4", "the nearest is student"),
    ):
        with pytest.raises(InputError, match=said):
            read_config("sdxl", assignments=[wrong])


def test_reading_loads_no_torch():
    code = "import sys; from vivace.distill import read_config; read_config('sdxl'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
