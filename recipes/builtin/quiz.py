"""Fresh captions drawn by the student and read back: what its weights are worth now."""

from __future__ import annotations

import random

import torch
from diffusers import AutoencoderTiny
from parts import tokenizer
from scenery import Supply
from student import Student, draw

from vivace.builtin.captions import facts, say
from vivace.builtin.judge import PARTS, judge
from vivace.builtin.reader import Reader, read


@torch.compiler.set_stance("force_eager")  # its batches have sizes of their own
def quiz(
    student: Student,
    vae: AutoencoderTiny,
    reader: Reader,
    *,
    heldout: str,
    n: int,
    seed: int,
    steps: int = 28,
    guidance: float = 3.0,
    shift: float = 1.0,
    pool: int = 1 << 16,
) -> dict[str, float]:
    """Shares of n fresh captions drawn right: by part, and wholly by object count."""
    device = next(student.parameters()).device.type
    supply, rng = Supply(seed, device, heldout=heldout, pool=pool, counts=(1.0, 1.0, 1.0)), random.Random(seed)
    tokens, tally = tokenizer(), {name: [] for name in (*PARTS, "right", "one", "two", "three")}
    generator = torch.Generator(device).manual_seed(seed)
    empty = torch.tensor(tokens("", padding="max_length").input_ids, device=device)
    for start in range(0, n, 500):
        size = min(500, n - start)
        pairs = [say(row, rng) for row in facts(supply.take(size))]
        ids = torch.tensor(
            tokens([t for t, _ in pairs], padding="max_length", truncation=True).input_ids, device=device
        )
        noise = torch.randn(size, 8, 32, 32, generator=generator, device=device)
        with torch.autocast(device, torch.bfloat16):
            x = draw(student, ids, empty.expand_as(ids), noise, steps=steps, guidance=guidance, shift=shift)
            with torch.no_grad():
                pictures = vae.decoder(x / vae.config.scaling_factor + vae.config.shift_factor).float() / 2 + 0.5
        for reading, (_, said) in zip(read(reader, pictures.clamp(0, 1)), pairs, strict=True):
            verdict = judge(reading, said)
            for part in (*PARTS, "right"):
                tally[part].append(verdict[part])
            tally[("one", "two", "three")[len(said.things) - 1]].append(verdict["right"])
    return {name: sum(v) / max(len(v), 1) for name, v in tally.items()}
