"""The built-in model as it ships: stock diffusers loads it, it draws and paints what is asked, and it stays small."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3InpaintPipeline, StableDiffusion3Pipeline
from PIL import Image, ImageDraw

from vivace import builtin, cli
from vivace.builtin.captions import COLOUR_NAMES, Said, Thing
from vivace.builtin.judge import judge
from vivace.builtin.reader import WEIGHTS, Reader, load_reader, read
from vivace.builtin.world import BACKGROUNDS, NO_RELATION, RELATIONS, SHAPES, SIZES
from vivace.few_step import FOLDER

STEPS = 10
ABSENT: dict[str, Any] = {"text_encoder_3": None, "tokenizer_3": None}


def thing(colour: str, shape: str, *, size: str | None = None, outlined: bool = False) -> Thing:
    return Thing(SHAPES.index(shape), COLOUR_NAMES.index(colour), SIZES.index(size) if size else None, outlined)


def said(*things: Thing, relation: str | None = None, on: tuple[str, str]) -> Said:
    between = () if len(things) == 1 else (RELATIONS.index(relation) if relation else NO_RELATION,)
    return Said(things, between, (BACKGROUNDS.index(on[0]), COLOUR_NAMES.index(on[1])))


ASKED = {
    "a large green triangle to the right of a small red circle on a yellow background": said(
        thing("green", "triangle", size="large"), thing("red", "circle", size="small"),
        relation="right", on=("plain", "yellow"),
    ),
    "a blue star on a striped white background": said(thing("blue", "star"), on=("striped", "white")),
    "a large outlined red heart on a white background": said(
        thing("red", "heart", size="large", outlined=True), on=("plain", "white")
    ),
    "a purple square above an orange circle on a white background": said(
        thing("purple", "square"), thing("orange", "circle"), relation="above", on=("plain", "white")
    ),
}  # fmt: skip
REPAINT = "a red circle to the left of a blue star on a white background"
REPAINTED = said(thing("red", "circle"), thing("blue", "star"), relation="left", on=("plain", "white"))


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion3Pipeline:
    found = StableDiffusion3Pipeline.from_pretrained(builtin.folder(), **ABSENT)
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture(scope="module")
def reader() -> Reader:
    return load_reader()


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """A red circle to the left of a green square, which lies in the half that is painted anew."""
    found = Image.new("RGB", (256, 256), "white")
    ImageDraw.Draw(found).ellipse((30, 90, 94, 154), fill=(225, 45, 45))
    ImageDraw.Draw(found).rectangle((150, 130, 200, 180), fill=(40, 165, 70))
    return found


@pytest.fixture(scope="module")
def mask() -> Image.Image:
    found = Image.new("L", (256, 256))
    found.paste(255, (128, 0, 256, 256))
    return found


def verdict(reader: Reader, drawn: Image.Image, wanted: Said) -> dict[str, bool]:
    pixels = torch.from_numpy(np.array(drawn.convert("RGB"))).permute(2, 0, 1)[None].float() / 255
    return judge(read(reader, pixels)[0], wanted)


def kept(drawn: Image.Image, picture: Image.Image) -> float:
    """The mean change of the half that is to stay, of 255."""
    change = np.asarray(drawn.convert("RGB")).astype(int) - np.asarray(picture).astype(int)
    return float(abs(change)[:, :112].mean())


def test_it_draws_what_is_asked(pipe, reader):
    drawn = pipe(
        list(ASKED), num_inference_steps=STEPS, guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(seed) for seed in range(len(ASKED))],
    ).images  # fmt: skip
    wanted = list(ASKED.values())
    wrong = {
        caption: [part for part, right in found.items() if not right]
        for caption, found in zip(ASKED, map(verdict, [reader] * len(drawn), drawn, wanted), strict=True)
    }
    assert not any(wrong.values()), wrong
    assert not any(verdict(reader, *pair)["right"] for pair in zip(drawn, wanted[1:] + wanted[:1], strict=True))


def test_the_stock_inpainting_class_paints_what_is_asked(pipe, reader, picture, mask):
    paint = StableDiffusion3InpaintPipeline(**pipe.components)
    paint.set_progress_bar_config(disable=True)
    drawn = paint(
        REPAINT, image=picture, mask_image=mask, strength=1.0, num_inference_steps=STEPS, guidance_scale=3.0,
        generator=torch.Generator().manual_seed(1),
    ).images[0]  # fmt: skip
    assert not verdict(reader, picture, REPAINTED)["right"]
    assert verdict(reader, drawn, REPAINTED)["right"]
    assert kept(drawn, picture) < 6


def test_the_command_line_paints_what_is_asked(reader, picture, mask, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    picture.save("in.png")
    mask.save("mask.png")
    command = ["generate", REPAINT, "--image", "in.png", "--mask", "mask.png", "--strength", "1", "--seed", "1"]
    with pytest.raises(SystemExit) as end:
        cli.main([*command, "--steps", str(STEPS), "--device", "cpu", "--json"])
    assert end.value.code == 0
    assert json.loads(capsys.readouterr().out)["applied"]["pipeline"] == "StableDiffusion3InpaintPipeline"
    drawn = Image.open("out.png")
    assert verdict(reader, drawn, REPAINTED)["right"]
    assert kept(drawn, picture) < 6


def test_it_stays_small():
    sizes = {path: path.stat().st_size for path in (*builtin.folder().rglob("*"), Path(WEIGHTS)) if path.is_file()}
    student = sum(size for path, size in sizes.items() if FOLDER in path.parts)
    assert student <= 3_000_000
    assert sum(sizes.values()) - student <= 26_000_000
    assert max(sizes.values()) < 15_000_000


def test_the_further_channels_hold_nothing(pipe):
    with torch.no_grad():
        latents = pipe.vae.encode(torch.rand(1, 3, 64, 64) * 2 - 1).latents
        noise = torch.randn_like(latents)
        other = torch.cat((noise[:, :8], torch.randn_like(noise[:, 8:])), dim=1)
        pictures = [pipe.vae.decode(z).sample for z in (noise, other)]
    assert latents.shape[1] == 16
    assert latents[:, :8].abs().amax() > 0.1
    assert not latents[:, 8:].any()
    assert torch.equal(*pictures)
