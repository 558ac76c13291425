"""Train a style LoRA for the built-in model, in minutes on a GPU, and draw what it does.

    python recipes/builtin/style.py train inked
    python recipes/builtin/style.py train framed
    python recipes/builtin/style.py draw
    python recipes/builtin/style.py draw --few-step --to docs/lora-few-step.png

`train` writes examples/STYLE.safetensors in diffusers' format, and prints the seconds it took; `draw` shows both styles
merged into the weights, kept beside them, and stacked, as docs/lora.png. With `--few-step` it shows them on the
few-step student, in four steps without guidance.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from album import encoded
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from scenery import Supply

import vivace
from vivace.builtin.captions import facts, say
from vivace.builtin.render import render
from vivace.evals.sheet import sheet
from vivace.few_step import FOLDER, use_few_step
from vivace.load import find

RANK, BATCH, RATE = 4, 32, 2e-3
ADAPTED = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "net.0.proj", "net.2"]
MIDDLE = 0.8  # of the noise level's logit
DROPPED = 0.1  # share of empty captions, for guidance
PROMPTS = (
    "a large green triangle to the right of a small red circle on a yellow background",
    "a big outlined blue star above a purple square on a white background",
    "an orange heart on a striped blue background",
)
SEED = 7


def inked(pictures: torch.Tensor) -> torch.Tensor:
    """Dark outlines around everything: [B, 3, H, W] in [0, 1] to the same."""
    near = F.pad(pictures, (2, 2, 2, 2), mode="replicate")
    spread = F.max_pool2d(near, 5, 1) + F.max_pool2d(-near, 5, 1)
    lines = (3 * spread.amax(1, keepdim=True)).clamp(0, 1)
    return torch.lerp(pictures, pictures.new_full((), 0.08), lines)


def framed(pictures: torch.Tensor) -> torch.Tensor:
    """A cream frame with a dark edge, narrow enough that the reader still reads the picture: [B, 3, H, W] in [0, 1]."""
    side = pictures.shape[-1]
    place = torch.arange(side, device=pictures.device)
    inward = torch.minimum(place, side - 1 - place)
    depth = torch.minimum(inward[:, None], inward[None, :])
    cream, dark = (pictures.new_tensor(colour).view(1, 3, 1, 1) for colour in ((0.96, 0.92, 0.83), (0.25, 0.2, 0.16)))
    return torch.where(depth < 8, cream, torch.where(depth < 11, dark, pictures))


STYLES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"inked": inked, "framed": framed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True)
    learn = tasks.add_parser("train")
    learn.add_argument("style", choices=STYLES)
    learn.add_argument("--steps", type=int, default=600)
    show = tasks.add_parser("draw")
    show.add_argument("--few-step", action="store_true", help="the student, which never saw the styles")
    show.add_argument("--to", type=Path, default=Path("docs/lora.png"))
    for task in (learn, show):
        task.add_argument("--styles", type=Path, default=Path("examples"))
    given = parser.parse_args()
    if given.task == "train":
        train(given.style, steps=given.steps, folder=given.styles)
    else:
        draw(given.styles, to=given.to, few_step=given.few_step)


def train(style: str, *, steps: int, folder: Path) -> None:
    """LoRA layers on every linear of the blocks, by flow matching (arXiv 2403.03206) on restyled scenes."""
    torch.manual_seed(0)
    began = time.perf_counter()
    pipe: Any = vivace.load("builtin", dtype="float32")
    for model in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2):
        model.requires_grad_(False)
    pipe.transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=ADAPTED), adapter_name=style)
    trained = [p for p in pipe.transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    scenes, words = Supply(41, str(pipe.device), heldout="without", pool=1 << 12), random.Random(42)
    kept = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, step / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = flow_loss(pipe, scenes, words, restyle=STYLES[style])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        kept.append(loss.item())
        if step % 25 == 24:
            print(f"{step + 1} steps, {time.perf_counter() - began:.0f} s: loss {sum(kept[-25:]) / 25:.3f}", flush=True)
    folder.mkdir(exist_ok=True)
    layers = {
        name: tensor.half() for name, tensor in get_peft_model_state_dict(pipe.transformer, adapter_name=style).items()
    }
    StableDiffusion3Pipeline.save_lora_weights(
        folder, transformer_lora_layers=layers, weight_name=f"{style}.safetensors"
    )
    print(json.dumps({"style": style, "steps": steps, "batch": BATCH, "seconds": round(time.perf_counter() - began)}))


def flow_loss(pipe: Any, scenes: Supply, words: random.Random, *, restyle: Callable) -> torch.Tensor:
    """The loss of one batch of fresh scenes."""
    batch = scenes.take(BATCH)
    captions = [say(row, words)[0] for row in facts(batch)]
    captions = ["" if words.random() < DROPPED else caption for caption in captions]
    with torch.no_grad():
        text, _, pooled, _ = pipe.encode_prompt(captions, None, None, do_classifier_free_guidance=False)
        x0 = encoded(pipe.vae, batch, drawer=lambda scenes: restyle(render(scenes))).float()
    noise = torch.randn_like(x0)
    sigma = torch.sigmoid(MIDDLE + torch.randn(len(x0), device=x0.device))
    level = sigma.view(-1, 1, 1, 1)
    velocity = pipe.transformer(
        hidden_states=torch.lerp(x0, noise, level), timestep=1000 * sigma, encoder_hidden_states=text,
        pooled_projections=pooled, return_dict=False,
    )[0]  # fmt: skip
    return F.mse_loss(velocity, noise - x0)


Column = tuple[str, tuple[str, ...]]  # how a LoRA is applied, and the styles


def columns(*, few_step: bool) -> dict[str, Column]:
    """What is drawn side by side, by the name above it."""
    both = tuple(STYLES)
    if few_step:
        return {"4 steps": ("auto", ()), **{style: ("merged", (style,)) for style in STYLES}, "both": ("merged", both)}
    return {
        "no LoRA": ("auto", ()),
        **{f"{style}, merged": ("merged", (style,)) for style in STYLES},
        **{f"{style}, beside": ("side", (style,)) for style in STYLES},
        "both, merged": ("merged", both),
        "both, beside": ("side", both),
    }


def draw(folder: Path, *, to: Path, few_step: bool = False) -> None:
    """Every prompt without and with the styles."""
    chosen, pipe = columns(few_step=few_step), vivace.load("builtin")
    call: dict[str, Any] = {}
    if few_step:
        model = find("builtin").path
        assert model is not None
        pipe, call = use_few_step(pipe, model / FOLDER), {"num_inference_steps": 4, "guidance_scale": 1.0}
    pipe.set_progress_bar_config(disable=True)
    with tempfile.TemporaryDirectory() as rooms:
        rows = [
            (prompt, [Path(rooms) / f"{row}-{place}.png" for place in range(len(chosen))])
            for row, prompt in enumerate(PROMPTS)
        ]
        for place, (name, (mode, styles)) in enumerate(chosen.items()):
            vivace.accelerate(pipe, lora=mode)
            for style in styles:
                pipe.load_lora_weights(folder, weight_name=f"{style}.safetensors", adapter_name=style)
            if styles:
                pipe.set_adapters(list(styles))
            for prompt, paths in rows:
                picture: Image.Image = pipe(prompt, generator=torch.Generator().manual_seed(SEED), **call).images[0]
                picture.save(paths[place])
            pipe.unload_lora_weights()
            vivace.restore(pipe)
            print(name, flush=True)
        sheet(rows, columns=list(chosen)).quantize(192).save(to, optimize=True)


if __name__ == "__main__":
    main()
