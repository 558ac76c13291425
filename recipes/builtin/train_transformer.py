"""Stage 4: text encoders and transformer by flow matching (arXiv 2403.03206) on encoded scenes."""

from __future__ import annotations

import multiprocessing
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from course import Average, Course, optimizer, update
from diffusers import AutoencoderTiny
from parts import tokenizer
from safetensors.torch import load_file, save_file
from scenery import Supply
from student import Student, cell_labels, draw

from vivace.builtin.captions import facts, say
from vivace.builtin.judge import PARTS, judge
from vivace.builtin.reader import Reader, read
from vivace.builtin.render import render
from vivace.builtin.world import Scenes, concatenate

CAPTIONS = 3  # wordings of every scene
DROPPED = 0.1  # share of empty captions, for guidance
TEACHING = 0.05  # weight of the teaching heads; it fades over the last half


@dataclass
class Album:
    """Encoded scenes on the device with their captions as token ids and labels."""

    scenes: Scenes
    latents: torch.Tensor  # [N, 8, 32, 32] float16, shifted and scaled
    ids: torch.Tensor  # [N, CAPTIONS, 48]
    labels: torch.Tensor  # [N, CAPTIONS, 17]


def captioned(job: tuple[int, list[list[int]]]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [n, CAPTIONS, 48] and labels [n, CAPTIONS, 17] of captions for rows of facts."""
    seed, rows = job
    rng = random.Random(seed)
    pairs = [say(row, rng) for row in rows for _ in range(CAPTIONS)]
    ids = tokenizer()([text for text, _ in pairs], padding="max_length", truncation=True).input_ids
    labels = [said.labels() for _, said in pairs]
    return tuple(np.array(part, np.int16).reshape(len(rows), CAPTIONS, -1) for part in (ids, labels))


def caption_all(rows: list[list[int]], seed: int, workers: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Caption every row, in parallel processes where there are several cores; reproducible."""
    jobs = [(seed + i, rows[i : i + 5000]) for i in range(0, len(rows), 5000)]
    if workers < 2:
        parts = [captioned(job) for job in jobs]
    else:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            parts = pool.map(captioned, jobs, chunksize=1)
    return tuple(torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True))


@torch.no_grad()
def encoded(vae: AutoencoderTiny, scenes: Scenes) -> torch.Tensor:
    """Latents of scenes, shifted and scaled, float16."""
    with torch.autocast(scenes.count.device.type, torch.bfloat16):
        z = vae.encoder(render(scenes) * 2 - 1)
    return ((z.float() - vae.config.shift_factor) * vae.config.scaling_factor).half()


def album(vae: AutoencoderTiny, supply: Supply, n: int, *, workers: int, chunk: int = 512) -> Album:
    """n encoded and captioned scenes."""
    scenes = concatenate([supply.take(chunk) for _ in range(n // chunk)])
    latents = torch.cat([encoded(vae, scenes[slice(i, i + chunk)]) for i in range(0, len(scenes), chunk)])
    ids, labels = caption_all(facts(scenes), 500, workers)
    device = latents.device
    return Album(scenes, latents, ids.to(device), labels.to(device))


def batch_of(book: Album, n: int, progress: float, empty: torch.Tensor, generator: torch.Generator) -> tuple:
    """One training batch: ids, labels, cells, whole, latents, noise, sigma."""
    device = book.latents.device
    crowded = progress > 0.15  # three objects join after the first part
    rows = torch.randint(len(book.scenes), (n if crowded else 2 * n,), generator=generator, device=device)
    if not crowded:
        rows = rows[(book.scenes.count[rows] < 3).float().topk(n).indices]
    wording = torch.randint(CAPTIONS, (n,), generator=generator, device=device)
    ids, labels = book.ids[rows, wording].long(), book.labels[rows, wording].long()
    dropped = (torch.rand(n, 1, generator=generator, device=device) < DROPPED).long()
    scenes = book.scenes[rows]
    x0 = book.latents[rows].float()
    sigma = torch.sigmoid(torch.randn(n, generator=generator, device=device))
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
) -> dict[str, float]:
    """Shares of n fresh captions drawn right: by part, and wholly by object count."""
    device = next(student.parameters()).device.type
    supply, rng = Supply(seed, device, heldout=heldout, counts=(1.0, 1.0, 1.0)), random.Random(seed)
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
            x = draw(student, ids, empty.expand_as(ids), noise, steps=steps, guidance=guidance)
            with torch.no_grad():
                pictures = vae.decoder(x / vae.config.scaling_factor + vae.config.shift_factor).float() / 2 + 0.5
        for reading, (_, said) in zip(read(reader, pictures.clamp(0, 1)), pairs, strict=True):
            verdict = judge(reading, said)
            for part in (*PARTS, "right"):
                tally[part].append(verdict[part])
            tally[("one", "two", "three")[len(said.things) - 1]].append(verdict["right"])
    return {name: sum(v) / max(len(v), 1) for name, v in tally.items()}


def train(
    course: Course,
    state: Path,
    out: Path,
    device: str,
    *,
    scenes: int,
    batch: int,
    workers: int,
    resume: Path | None = None,
    quizzes: int = 6,
) -> Student:
    """Train from nothing, from the state an earlier call left, or from exported averaged weights (`resume`)."""
    torch.manual_seed(31)
    vae = AutoencoderTiny.from_pretrained(state / "vae").to(device, memory_format=torch.channels_last)
    reader = Reader().to(device)
    reader.load_state_dict(torch.load(state / "reader.pt", weights_only=True))
    student = Student().to(device)
    text = [p for m in (student.clip, student.least) for p in m.parameters()]
    rest = [p for p in student.parameters() if all(p is not q for q in text)]
    optim = optimizer([{"params": text, "share": 0.5}, {"params": rest}])
    if resume is not None:
        student.load_state_dict(weights_of(resume))
    average, begun = Average(student, 0.9998), 0
    if (state / "student.pt").exists() and course.first > 0:
        kept = torch.load(state / "student.pt", weights_only=True, map_location=device)
        student.load_state_dict(kept["live"])
        optim.load_state_dict(kept["optim"])
        average.mean, average.step, begun = kept["mean"], kept["step"], kept["step"]
    generator = torch.Generator(device).manual_seed(32 + begun)
    if device == "cuda":  # block by block: one compilation serves all blocks of a kind
        for block in (*student.denoiser.transformer_blocks, *student.clip.text_model.encoder.layers):
            block.compile()
    supply = Supply(300 + begun, device, heldout="without", pool=1 << 17)
    book = album(vae, supply, scenes, workers=workers)
    course.log(begun, scenes=len(book.scenes))
    empty = torch.tensor(tokenizer()("", padding="max_length").input_ids, device=device)
    parameters = [p for p in student.parameters() if p.requires_grad]
    due = course.first
    for step, progress in enumerate(course, start=begun):
        data = batch_of(book, batch, progress, empty, generator)
        with torch.autocast(device, torch.bfloat16):
            flow, teach = student(*data)
        (flow + TEACHING * min(1.0, 2 - 2 * progress) * teach).backward()
        update(optim, parameters, course.rate(progress, step))
        average.update()
        if step % 250 == 0:
            course.log(step, flow=flow.item(), teach=teach.item())
        if progress >= due + (course.last - course.first) / quizzes:
            due = progress
            average.swap()
            course.log(
                step, **quiz(student.eval(), vae, reader, heldout="without", n=course_size(device) // 3, seed=902)
            )
            average.swap()
    kept = {"live": student.state_dict(), "optim": optim.state_dict(), "mean": average.mean, "step": average.step}
    torch.save(kept, state / "student.pt")
    average.swap()
    course.log(
        begun + course.steps, **quiz(student.eval(), vae, reader, heldout="without", n=course_size(device), seed=903)
    )
    course.log(
        begun + course.steps,
        heldout=quiz(student, vae, reader, heldout="only", n=course_size(device), seed=904)["right"],
    )
    export(student, out)
    course.save(out)
    return student


def course_size(device: str) -> int:
    """Captions of a full quiz."""
    return 1500 if device == "cuda" else 12


def export(student: Student, out: Path) -> None:
    """Averaged weights in 16 bit, in two files."""
    items = sorted(student.state_dict().items(), key=lambda item: item[1].numel())
    for part in (0, 1):
        tensors = {name: value.half().contiguous() for name, value in items[part::2]}
        save_file(tensors, out / f"student-{part + 1}.safetensors")


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Exported averaged weights, in float32."""
    parts = [load_file(folder / f"student-{part}.safetensors") for part in (1, 2)]
    return {name: value.float() for part in parts for name, value in part.items()}
