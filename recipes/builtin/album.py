"""Encoded, captioned scenes that stay on the device, and the training batches drawn from them."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from parts import tokenizer
from safetensors.torch import load_file, save_file
from scenery import Supply
from student import cell_labels

from vivace.builtin.captions import facts, say
from vivace.builtin.render import render
from vivace.builtin.world import Scenes, concatenate

CAPTIONS = 3  # wordings of every scene
DROPPED = 0.1  # share of empty captions, for guidance
MIDDLE = 0.5  # of the noise level's logit: shapes are settled while it is high


@dataclass
class Album:
    """Encoded scenes on the device with their captions as token ids and labels."""

    scenes: Scenes
    latents: torch.Tensor  # [N, 8, 32, 32] float16, shifted and scaled
    ids: torch.Tensor  # [N, CAPTIONS, 48]
    labels: torch.Tensor  # [N, CAPTIONS, 17]

    def save(self, path: Path) -> None:
        tensors = {"latents": self.latents, "ids": self.ids, "labels": self.labels}
        save_file(tensors | {f"scenes.{f.name}": getattr(self.scenes, f.name) for f in fields(Scenes)}, path)

    @classmethod
    def load(cls, path: Path, device: str) -> Album:
        tensors = load_file(path, device=device)
        scenes = Scenes(**{f.name: tensors.pop(f"scenes.{f.name}") for f in fields(Scenes)})
        return cls(scenes=scenes, **tensors)


def captioned(job: tuple[int, list[list[int]]]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [n, CAPTIONS, 48] and labels [n, CAPTIONS, 17] of captions for rows of facts."""
    seed, rows = job
    rng = random.Random(seed)
    pairs = [say(row, rng) for row in rows for _ in range(CAPTIONS)]
    ids = tokenizer()([text for text, _ in pairs], padding="max_length", truncation=True).input_ids
    labels = [said.labels() for _, said in pairs]
    return tuple(np.array(part, np.int16).reshape(len(rows), CAPTIONS, -1) for part in (ids, labels))


def caption_all(rows: list[list[int]], seed: int, pool) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """Have every row captioned by the pool's processes meanwhile, reproducibly; the result waits for the end."""
    jobs = [(seed + i, rows[i : i + 5000]) for i in range(0, len(rows), 5000)]
    running = pool.map_async(captioned, jobs, chunksize=1)
    return lambda: tuple(torch.from_numpy(np.concatenate(column)) for column in zip(*running.get(), strict=True))


@torch.no_grad()
def encoded(vae: AutoencoderTiny, scenes: Scenes, *, drawer: Callable = render) -> torch.Tensor:
    """Latents of scenes, shifted and scaled, float16."""
    with torch.autocast(scenes.count.device.type, torch.bfloat16):
        z = vae.encoder(drawer(scenes) * 2 - 1)
    return ((z.float() - vae.config.shift_factor) * vae.config.scaling_factor).half().contiguous()


def album(vae: AutoencoderTiny, supply: Supply, n: int, *, workers: int, chunk: int = 512) -> Album:
    """n encoded and captioned scenes."""
    chunk = min(n, chunk)
    scenes = concatenate([supply.take(chunk) for _ in range(n // chunk)])
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        captions = caption_all(facts(scenes), 500, pool)
        latents = torch.cat([encoded(vae, scenes[slice(i, i + chunk)]) for i in range(0, len(scenes), chunk)])
        ids, labels = captions()
    device = latents.device
    return Album(scenes, latents, ids.to(device), labels.to(device))


def batch_of(book: Album, n: int, progress: float, empty: torch.Tensor, generator: torch.Generator) -> tuple:
    """One training batch: ids, labels, cells, whole, latents, noise, sigma."""
    device = book.latents.device
    crowded = progress > 0.06  # three objects join after the first part
    rows = torch.randint(len(book.scenes), (n if crowded else 2 * n,), generator=generator, device=device)
    if not crowded:
        rows = rows[(book.scenes.count[rows] < 3).float().topk(n).indices]
    wording = torch.randint(CAPTIONS, (n,), generator=generator, device=device)
    ids, labels = book.ids[rows, wording].long(), book.labels[rows, wording].long()
    dropped = (torch.rand(n, 1, generator=generator, device=device) < DROPPED).long()
    scenes = book.scenes[rows]
    x0 = book.latents[rows].float()
    sigma = torch.sigmoid(MIDDLE + torch.randn(n, generator=generator, device=device))
    uniform = torch.rand(n, generator=generator, device=device)
    sigma = torch.where(torch.rand(n, generator=generator, device=device) < 0.2, uniform, sigma)
    return (
        ids * (1 - dropped) + empty * dropped,
        labels * (1 - dropped),
        cell_labels(scenes),
        torch.stack((scenes.background, scenes.ground), dim=1),
        x0,
        torch.randn(x0.shape, generator=generator, device=device),
        sigma,
    )
