"""A ladder: rungs in their order with ours on top, a CSV that diffusion-fast's readers know, and a chart."""

import csv
import itertools
import json
import sys

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from vivace.bench import ladder
from vivace.bench.book import Book
from vivace.bench.contestant import Contestant, may_quantise, prepare
from vivace.bench.run import Bench
from vivace.bench.rungs import LADDERS, RUNGS, climb, columns_of, rungs_of
from vivace.bench.subject import build
from vivace.bench.workload import workload_of

MACHINE = {"processor": "a processor", "cores": 2, "versions": {"torch": "2.13.0"}}
THEIRS = [
    *("pipeline_cls", "ckpt_id", "bf16", "sdpa", "fused_qkv_projections", "upcast_vae", "batch_size"),
    *("num_inference_steps", "compile_unet", "compile_vae", "compile_mode", "change_comp_config", "do_quant"),
    *("time (secs)", "memory (gbs)", "actual_gpu_memory (gbs)", "tag"),
]


def workload(name="sd:1.5", *, dtype="bfloat16", **options):
    return workload_of(name, device="cpu", dtype=dtype, end_to_end=True, **{"tiny": True, **options})


@pytest.fixture(autouse=True)
def _attention_as_it_was():
    yield
    for switch in ("enable_flash_sdp", "enable_mem_efficient_sdp", "enable_cudnn_sdp"):
        getattr(torch.backends.cuda, switch)(True)


@pytest.fixture
def folder(tmp_path):
    """A bench of a ladder whose times were made up: twice as fast with every rung, int8 without torchao."""
    book, load = Book(tmp_path), workload()
    names = [(one.label, one.ours) for one in rungs_of(load, presets=["exact"])]
    for index, (name, ours) in enumerate(reversed(names)):
        line = {"title": load.name, "contestant": name, "ours": ours, "workload": load.to_dict(), "machine": MACHINE}
        line |= {"command": "vivace bench --ladder sd15", "status": "not offered", "why": "torchao is not installed"}
        if name != "+ int8":
            line |= {"status": "done", "detail": "so", "median_ms": 10.0 * 2**index, "cold_seconds": 3.0}
            line |= {"peak_bytes": 2**30, "error": 1e-3, "quiz": {"right": 9, "total": 12}, "reserved_bytes": None}
        book.append(line)
    return tmp_path


def test_the_rungs_in_their_order(folder):
    chart = ladder.write(folder, name="sd15", workload=workload())
    steps = json.loads((folder / "ladder-sd15.json").read_text())["rungs"]
    assert [step["rung"] for step in steps] == [*(rung.name for rung in RUNGS), "vivace exact"]
    assert steps[0]["x first"] == 1
    assert steps[-1]["x first"] == 64
    assert steps[5]["how"] == "torchao is not installed"
    # Ours is there, in its colour.
    with Image.open(chart) as picture:
        assert picture.size[0] > 1400
        assert (0xD9, 0x48, 0x0F) in [colour for _, colour in picture.convert("RGB").getcolors(1 << 20)]
    text = (folder / "ladder-sd15.md").read_text()
    assert "| + compile | 0.040 | 16.00 | 3.0 | 1.00 | 1.0e-03 | 75% of 12 | so |" in text
    assert "`vivace bench --ladder sd15`" in text


def test_the_columns_of_diffusion_fast(folder):
    ladder.write(folder, name="sd15", workload=workload())
    rows = list(csv.DictReader((folder / "ladder-sd15.csv").open()))
    assert [*rows[0]][: len(THEIRS)] == THEIRS
    assert [row["tag"] for row in rows] == [
        "fp32, plain",
        "+ 16 bit",
        "+ SDPA",
        "+ fused QKV",
        "+ compile",
        "vivace exact",
    ]
    on = {row["tag"]: {key for key, value in row.items() if value == "True"} for row in rows}
    assert on["fp32, plain"] == set()
    assert on["+ fused QKV"] == {"bf16", "sdpa", "fused_qkv_projections"}
    assert on["+ compile"] == on["+ fused QKV"] | {"compile_unet", "compile_vae"}
    assert rows[0]["pipeline_cls"] == "StableDiffusionPipeline"
    assert float(rows[0]["time (secs)"]) == 0.64


@pytest.mark.parametrize(("unet", "said"), [("None", "default"), ("'reduce-overhead'", "reduce-overhead")])
def test_the_mode_of_a_ladder_is_its_denoisers(folder, unet, said):
    book = folder / "bench.jsonl"
    lines = [json.loads(line) for line in book.read_text().splitlines()]
    detail = f"torch.compile(fullgraph=True) of UNet (mode={unet}), Decoder (mode='reduce-overhead')"
    book.write_text("".join(json.dumps(line | {"detail": detail}) + "\n" for line in lines))
    ladder.write(folder, name="sd15", workload=workload())
    rows = csv.DictReader((folder / "ladder-sd15.csv").open())
    assert {row["tag"]: row["compile_mode"] for row in rows if row["compile_mode"]} == {"+ compile": said}


def test_a_chart_that_is_ended_midway_leaves_the_earlier_one(folder, monkeypatch):
    chart = ladder.write(folder, name="sd15", workload=workload())
    before = chart.read_bytes()

    def ended(self, path, **_):
        path.write_bytes(b"")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", ended)
    with pytest.raises(KeyboardInterrupt):
        ladder.write(folder, name="sd15", workload=workload())
    assert chart.read_bytes() == before
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_rung_has_all_below_it():
    names = [rung.name for rung in RUNGS]
    for lower, upper in itertools.pairwise(names):
        assert set(columns_of(lower)) < set(columns_of(upper))
    assert columns_of("vivace exact") == {}
    wide = workload(dtype="float32")
    assert "+ 16 bit" not in [one.name for one in rungs_of(wide, presets=[])]
    assert not any(one.quiz for one in rungs_of(wide, presets=[]))


@pytest.mark.parametrize("name", LADDERS)
def test_every_ladder_has_its_workload(name):
    assert workload_of(LADDERS[name], device="cpu", dtype="float32", end_to_end=True).facts.denoisers


def test_climbing_changes_speed_and_not_the_picture():
    load = workload(dtype="float32")
    pictures = {}
    for name in ("fp32, plain", "+ SDPA", "+ fused QKV"):
        pipe = build(load)
        done = prepare(Contestant(name=name, rung=True), pipe, load)
        generator = torch.Generator().manual_seed(0)
        pictures[name] = pipe(
            "a fox", num_inference_steps=1, height=64, width=64, generator=generator, output_type="pt"
        )
    assert "fuse_qkv_projections of UNet2DConditionModel" in done
    assert pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.fused_projections
    first = pictures["fp32, plain"].images
    assert all(torch.allclose(one.images, first, atol=1e-4) for one in pictures.values())


def test_a_rung_that_lacks_a_package_is_tried_again_when_it_is_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    load = workload(dtype="float32")
    with pytest.raises(ModuleNotFoundError, match="torchao is not installed; pip install"):  # not "not offered"
        climb(build(load), load, to="+ int8")


def test_int8_leaves_a_time_embedding_as_it_was():
    load = workload()
    taken = {name for name, module in build(load).unet.named_modules() if may_quantise(module, name, load)}
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q" in taken
    assert not {name for name in taken if "time_emb" in name}  # torch._int_mm takes more than 16 rows


def test_plain_attention_is_plain():
    pipe, load = build(workload()), workload()
    assert "float32" in climb(pipe, load, to="fp32, plain")
    assert pipe.unet.dtype == torch.float32
    assert not torch.backends.cuda.flash_sdp_enabled()
    climb(build(load), load, to="+ SDPA")
    assert torch.backends.cuda.flash_sdp_enabled()


def test_a_ladder_on_the_cpu(tmp_path):
    load = workload(dtype="float32")
    contestants = [Contestant(name="+ SDPA", rung=True), Contestant(name="exact", ours=True)]
    told = {"machine": MACHINE, "command": "vivace bench --ladder sd15 --tiny", "limit": 250.0}
    assert Bench(workloads=[load], contestants=contestants, folder=tmp_path, **told).run() == 0
    rows = ladder.rows(Book(tmp_path).contests())
    assert [row["rung"] for row in rows] == ["+ SDPA", "vivace exact"]
    assert all(row["seconds"] > 0 and row["error"] < 1e-3 for row in rows)
    assert rows[1]["how"] == 'vivace.accelerate("exact", prompts=off)'


def test_an_unknown_ladder_is_one_line():
    from vivace.cli import app

    result = CliRunner().invoke(app, ["bench", "--ladder", "sdx"])
    assert "unknown ladder 'sdx'; --ladder takes sdxl" in str(result.exception or result.output)
