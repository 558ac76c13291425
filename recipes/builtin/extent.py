"""How much of everything a run of the recipe takes, and where it keeps what."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Extent:
    """The sizes of a run that do not change what is built: pictures, captions, scenes."""

    reader: int = 256
    """Pictures a step of the reader."""
    autoencoder: int = 96
    """Crops a step of the autoencoder."""
    transformer: int = 512
    """Scenes a step of the transformer."""
    pool: int = 1 << 16
    """Scenes drawn ahead."""
    scenes: int = 384 * 1024
    """Encoded scenes that the transformer learns from."""
    judged: int = 10_000
    """Pictures that a gate of the reader is judged on."""
    measured: int = 256
    """Pictures that the latents are measured on."""
    quizzed: int = 1500
    """Captions of the transformer's last quiz; a third of them on the way."""
    quizzes: int = 4
    """Quizzes on the way, in each part of the transformer's schedule."""
    chosen: int = 600
    """Captions that guidance and shift are chosen on."""
    guidances: tuple[float, ...] = (2.0, 3.0, 4.0)
    shifts: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0)
    steps: int = 28
    few: int = 10
    """Steps of the pictures, and of those at few steps."""
    captions: int = 10_000
    few_captions: int = 4000
    """Captions of the evaluation at `steps` and at `few` steps."""
    grid: int = 8
    """Pictures a side of the grid."""


FULL = Extent()
TINY = Extent(
    reader=2, autoencoder=2, transformer=2, pool=1 << 8, scenes=16, judged=2, measured=2, quizzed=3, quizzes=1,
    chosen=3, guidances=(3.0,), shifts=(3.0,), steps=2, few=1, captions=3, few_captions=3, grid=2,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run: `state` keeps what the next stage needs, `out` what the run is for.

    In `out`: reader.safetensors, vae/ and student-*.safetensors, averaged and 16 bit, which `resume` of another run
    takes up again; curves.json; and, at the end, model/ and the figures.
    """

    state: Path
    out: Path
    device: str
    extent: Extent = field(default=FULL)
    resume: Path | None = None
