"""A plan says before loading what the report says after accelerating."""

import json

import pytest
import torch

import vivace
from vivace import InputError, cli
from vivace.bench import roofline
from vivace.families import FAMILIES
from vivace.quant import folder


@pytest.mark.parametrize("family", FAMILIES)
def test_forecasts_the_report_of_every_family(family, tmp_path):
    pipe = FAMILIES[family].tiny()
    pipe.save_pretrained(tmp_path)
    forecast = vivace.plan(tmp_path, device="cpu", dtype="float32")
    done = vivace.report(vivace.accelerate(pipe))
    assert forecast.pipeline == done.pipeline
    assert forecast.family == done.family == family
    assert forecast.attention == done.attention
    assert [(note.name, note.done) for note in forecast.passes] == [(note.name, note.done) for note in done.passes]
    left = [note for note in done.passes if not note.done]
    assert [note for note in forecast.passes if not note.done] == left
    assert forecast.weight_bytes == sum(forecast.components.values())


@pytest.mark.parametrize("fields", [{"quant": "int8"}, {"quant": "int8_weights"}, {"preset": "balanced"}])
def test_counts_the_bytes_of_quantised_layers(fields, tmp_path):
    pipe = FAMILIES["sd3"].tiny()
    pipe.save_pretrained(tmp_path)
    preset, fields = fields.get("preset", "exact"), {name: v for name, v in fields.items() if name != "preset"}
    forecast = vivace.plan(tmp_path, preset, device="cpu", **fields)
    done = vivace.report(vivace.accelerate(pipe, preset, **fields))
    (note,) = (note for note in forecast.passes if note.name == "quant")
    (real,) = (note for note in done.passes if note.name == "quant")
    assert note.done == real.done
    assert real.detail.startswith(note.detail)
    assert forecast.components["transformer"] + forecast.added_bytes == pytest.approx(done.weight_bytes, rel=0.02)
    assert (forecast.added_bytes < 0) == note.done


@pytest.mark.parametrize("format", ["int8", "int4_weights"])
def test_a_folder_that_is_quantised_already(format, tmp_path):
    pipe = vivace.accelerate(FAMILIES["sd3"].tiny(), quant=format, keep_base="no")
    folder.write(pipe, tmp_path, denoisers={"transformer": pipe.transformer})
    forecast = vivace.plan(tmp_path, "fast", device="cpu")
    done = vivace.report(vivace.accelerate(vivace.load(tmp_path, device="cpu"), "fast"))
    (note,) = (note for note in forecast.passes if note.name == "quant")
    (real,) = (note for note in done.passes if note.name == "quant")
    assert note.done
    assert real.detail.startswith(note.detail)
    assert [(note.name, note.done) for note in forecast.passes] == [(note.name, note.done) for note in done.passes]
    assert forecast.components["transformer"] == pytest.approx(done.weight_bytes, rel=0.02)
    assert forecast.added_bytes == 0
    with pytest.raises(InputError, match=f"its layers are in {format} already"):
        vivace.plan(tmp_path, device="cpu", quant="fp8")


def test_reads_no_weight_and_changes_nothing(tmp_path):
    pipe = FAMILIES["sd3"].tiny()
    pipe.save_pretrained(tmp_path)
    (weights,) = (tmp_path / "transformer").glob("*.safetensors")
    header = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    data = weights.read_bytes()
    weights.write_bytes(data[:header] + b"\0" * (len(data) - header))
    assert vivace.plan(tmp_path, device="cpu").components["transformer"] > 0


def test_a_family_that_is_unknown_here_goes_the_generic_lane(tmp_path):
    pipe = FAMILIES["pixart"].tiny()
    pipe.save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(
        index.read_text().replace("PixArtSigmaPipeline", "LuminaPipeline").replace("PixArtAlpha", "Lumina")
    )
    forecast = vivace.plan(tmp_path, device="cpu")
    assert forecast.family is None
    assert "generic lane" in str(forecast)


@pytest.mark.parametrize(
    ("model", "fields", "said"),
    [
        ("flux", {"graphs": "on"}, "graphs='on' cannot be done here: CUDA graphs need a CUDA device"),
        ("flux:huge", {}, "flux has no variant 'huge'"),
        ("/nowhere", {}, "no model at /nowhere"),
        ("flux", {"grafs": "on"}, "unknown Config field 'grafs'"),
    ],
)
def test_refused(model, fields, said):
    with pytest.raises(InputError, match=said):
        vivace.plan(model, device="cpu", **fields)


def test_on_the_command_line(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["plan", "flux:schnell", "--set", "graphs=off", "--dtype", "bfloat16", "--device", "cpu", "--json"])
    assert end.value.code == 0
    said = json.loads(capsys.readouterr().out)
    assert said["preset"] == "custom"
    assert said["components"]["transformer"] == 2 * FAMILIES["flux"].variants["schnell"].parameters
    assert said["dtype"] == "bfloat16"
    assert {"name": "graphs", "done": False, "detail": "switched off"} in said["passes"]


@pytest.mark.parametrize(("cache", "held"), [("steps:compute=0", 1), ("firstblock", 2), ("pab", 7)])
def test_forecasts_a_caches_memory_at_the_size_that_a_model_has_positions_for(cache, held):
    """The built-in model's 256 pixels, where published ones of its family have 1024."""
    (note,) = (note for note in vivace.plan("builtin", cache=cache, device="cpu").passes if note.name == "cache")
    assert note.detail == f"{cache}, at most {held} MiB in a request of the usual size"


def test_the_table():
    text = str(vivace.plan("sdxl", device="cpu", dtype=torch.float16)).splitlines()
    assert text[0] == "sdxl: StableDiffusionXLPipeline (sdxl), preset exact, float16 on cpu"
    assert any(line.startswith("  cross attention: 70 layers, native") for line in text)
    assert text[-2].startswith("  memory: weights 6.46 GiB (unet 4.78 GiB, vae 0.16 GiB")
    assert text[-1] == "  one denoiser forward: 13.52 TFLOP"


def test_a_budget_is_planned_without_a_gpu():
    """What it says is for a machine that has one; quantised weights count as they will be."""
    lines = {}
    for quant in ("off", "fp8_weights"):
        found = vivace.plan("flux:dev", vram="24GB", quant=quant)
        assert found.dtype == "bfloat16"
        lines[quant] = next(note.detail for note in found.passes if note.name == "vram")
    assert "transformer 22.17 GiB" in lines["off"]
    assert "streamed from the host" in lines["off"]
    assert "transformer 11.14 GiB: on the device" in lines["fp8_weights"]


def test_a_budget_says_how_much_slower_it_is_on_a_gpu_that_was_measured(monkeypatch):
    monkeypatch.setattr(roofline, "rate_of", lambda *place: 700.0)
    found = vivace.plan("flux", vram="12GB")
    moved = 37 / 57  # of a transformer of 22.17 GiB, whose double blocks are larger
    assert found.forward_ms == pytest.approx(106, abs=1)
    assert found.slowdown == pytest.approx(moved * 22.17 * 2**30 / 25e9 / 0.106, rel=0.1)
    assert f"up to {found.slowdown:.1f} times that while its weights come" in str(found)
    assert vivace.plan("flux", vram="80GB").slowdown is None


def test_a_budget_says_how_much_slower_it_is_at_most_where_no_gpu_says_how_fast_it_is():
    found = vivace.plan("flux", vram="12GB", device="cpu")
    assert found.forward_ms is None
    least = found.forward_tflop / roofline.RATES["NVIDIA H200"].bf16
    assert found.slowdown == pytest.approx(37 / 57 * 22.17 * 2**30 / 25e9 / least, rel=0.1)
    assert f"up to {found.slowdown:.1f} times a resident one's time on an NVIDIA H200, and less" in str(found)
    assert vivace.plan("flux", device="cpu").slowdown is None
