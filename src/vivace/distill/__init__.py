"""Few-step distillation of any conditional diffusion model, on stock diffusers. Importing loads no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vivace.distill.config import (
    Conditioner,
    Critic,
    Data,
    Discriminator,
    DistillConfig,
    Optimizer,
    Records,
    Stage,
    Student,
)
from vivace.distill.reading import read_config

if TYPE_CHECKING:
    from vivace.distill.trainer import train

__all__ = [
    "Conditioner",
    "Critic",
    "Data",
    "Discriminator",
    "DistillConfig",
    "Optimizer",
    "Records",
    "Stage",
    "Student",
    "read_config",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "train":
        from vivace.distill.trainer import train

        return train
    raise AttributeError(f"module 'vivace.distill' has no attribute {name!r}; it has {', '.join(__all__)}")
