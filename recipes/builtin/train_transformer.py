"""Stage 4: text encoders and transformer by flow matching (arXiv 2403.03206) on encoded scenes."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from album import Album, album, batch_of
from course import Average, Course, follow, optimizer, update
from diffusers import AutoencoderTiny
from extent import Run
from muon import Muon
from parts import tokenizer
from quiz import quiz
from safetensors.torch import load_file, save_file
from scenery import Supply
from student import Student

from vivace.builtin.reader import Reader

PARTS = ("student-1.safetensors", "student-2.safetensors")  # the averaged weights, each file under 15 MB
TEACHING = 0.05  # weight of the teaching heads; it fades over the last half


def optimizers(student: Student) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks, AdamW for the rest: embeddings, modulation, norms, biases, heads."""
    blocks = (*student.denoiser.transformer_blocks, *student.clip.text_model.encoder.layers)
    matrices = [p for b in blocks for name, p in b.named_parameters() if p.ndim == 2 and "norm" not in name]
    taken = {id(p) for p in matrices}
    text = [p for m in (student.clip, student.least) for p in m.parameters() if id(p) not in taken]
    taken |= {id(p) for p in text}
    rest = [p for p in student.parameters() if id(p) not in taken]
    return [Muon(matrices), optimizer([{"params": text, "share": 0.5}, {"params": rest}])]


class Training:
    """The student, its optimizers and its averaged weights.

    A step launches a thousand small kernels, which takes Python longer than the GPU takes to run them: `record` makes
    one CUDA graph of it.
    """

    def __init__(self, device: str, *, resume: Path | None):
        self.student = Student().to(device)
        if resume is not None:
            self.student.load_state_dict(weights_of(resume))
        self.optims = optimizers(self.student)
        self.average = Average(self.student, 0.9998)
        self.teaching = torch.zeros((), device=device)
        self.data: tuple[torch.Tensor, ...] = ()
        self.losses: tuple[torch.Tensor, ...] = ()
        self.graph: torch.cuda.CUDAGraph | None = None

    def load(self, path: Path, device: str) -> None:
        kept = torch.load(path, weights_only=True, map_location=device)
        self.student.load_state_dict(kept["live"])
        for optim, state in zip(self.optims, kept["optims"], strict=True):
            optim.load_state_dict(state)
        self.average.mean, self.average.step = kept["mean"], kept["step"]

    def save(self, path: Path) -> None:
        optims = [optim.state_dict() for optim in self.optims]
        mean, step = self.average.mean, self.average.step
        torch.save({"live": self.student.state_dict(), "optims": optims, "mean": mean, "step": step}, path)

    def step(self, data: tuple[torch.Tensor, ...], teaching: float, rate: float) -> tuple[torch.Tensor, ...]:
        """One update; the flow-matching loss and the teaching loss."""
        self.teaching.fill_(teaching)
        follow(self.optims, rate)
        if self.graph is None:
            self.data = data
            self.work()
        else:
            torch._foreach_copy_(list(self.data), list(data))
            self.graph.replay()
        self.average.update()
        return self.losses

    def work(self) -> None:
        """What a step does on the device, all shapes fixed."""
        with torch.autocast(self.teaching.device.type, torch.bfloat16):
            flow, teach = self.student(*self.data)
        update(self.optims, flow + self.teaching * teach, self.average.live)
        self.losses = (flow.detach(), teach.detach())

    def record(self, data: tuple[torch.Tensor, ...]) -> None:
        """Compile block by block (one compilation serves all of a kind), then record; the weights stay as they are."""
        for block in self.student.denoiser.transformer_blocks:
            block.compile()
        follow(self.optims, 0.0)
        self.data = tuple(t.clone() for t in data)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.work()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.work()


def train(course: Course, run: Run, *, workers: int) -> Student:
    """Train from nothing, from the state an earlier call left, or from exported averaged weights (`run.resume`)."""
    state, device, extent = run.state, run.device, run.extent
    torch.manual_seed(31)
    vae = AutoencoderTiny.from_pretrained(state / "vae").to(device, memory_format=torch.channels_last)
    reader = Reader().to(device)
    reader.load_state_dict(torch.load(state / "reader.pt", weights_only=True))
    training = Training(device, resume=run.resume)
    if (state / "student.pt").exists() and course.first > 0:
        training.load(state / "student.pt", device)
    begun = training.average.step
    book = kept_album(vae, run, workers=workers)
    course.log(begun, scenes=len(book.scenes))
    generator = torch.Generator(device).manual_seed(32 + begun)
    empty = torch.tensor(tokenizer()("", padding="max_length").input_ids, device=device)
    if device == "cuda":
        training.record(batch_of(book, extent.transformer, 1.0, empty, generator))
    due = course.first

    def examine(step: int, **sets: tuple[str, int]) -> None:
        training.average.swap()
        for name, (heldout, n) in sets.items():
            found = quiz(
                training.student, vae, reader, heldout=heldout, n=n, seed=902, pool=extent.pool, steps=extent.steps
            )
            course.log(step, **(found if name == "all" else {name: found["right"]}))
        training.average.swap()

    for step, progress in enumerate(course, start=begun):
        data = batch_of(book, extent.transformer, progress, empty, generator)
        flow, teach = training.step(data, TEACHING * min(1.0, 2 - 2 * progress), course.rate(progress, step))
        if step % 250 == 0:
            course.log(step, flow=flow.item(), teach=teach.item())
            if not flow.item() < (4 if step < 250 else 0.8):
                sys.exit(f"transformer diverges: the loss is {flow.item():.3f} after {step} steps")
        if progress >= due + (course.last - course.first) / extent.quizzes:
            due = progress
            examine(step, all=("without", extent.quizzed // 3))
    training.save(state / "student.pt")
    examine(training.average.step, all=("without", extent.quizzed), heldout=("only", extent.quizzed))
    course.compare("heldout", "right")
    training.average.swap()
    export(training.student, run.out)
    course.save(run.out)
    return training.student


def kept_album(vae: AutoencoderTiny, run: Run, *, workers: int) -> Album:
    """The album that an earlier call made, or a new one."""
    path = run.state / "album.safetensors"
    if path.exists():
        return Album.load(path, run.device)
    supply = Supply(300, run.device, heldout="without", pool=2 * run.extent.pool)
    book = album(vae, supply, run.extent.scenes, workers=workers)
    book.save(path)
    return book


def export(student: Student, out: Path) -> None:
    """Averaged weights in 16 bit, in two files."""
    items = sorted(student.state_dict().items(), key=lambda item: item[1].numel())
    for part, file in enumerate(PARTS):
        save_file({name: value.half().contiguous() for name, value in items[part :: len(PARTS)]}, out / file)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Exported averaged weights, in float32."""
    parts = [load_file(folder / file) for file in PARTS]
    return {name: value.float() for part in parts for name, value in part.items()}
