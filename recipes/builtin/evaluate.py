"""Examine a published model as `vivace eval builtin` examines the shipped one, at many and at few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from extent import Extent

from vivace.builtin.reader import load_reader
from vivace.evals.builtin import draw_exam, metrics, take
from vivace.evals.metric import to_json
from vivace.load import find, load_source
from vivace.machine import machine


def evaluate(folder: Path, *, device: str, extent: Extent) -> dict[str, float]:
    """Write eval.json and eval-few-steps.json beside FOLDER's model; give the shares that the gate asks for."""
    source = find(folder / "model")
    pipe: Any = load_source(source, device=device)
    pipe.set_progress_bar_config(disable=True)
    reader = load_reader(folder / "reader.safetensors", device=pipe.device)
    guidance, shares = source.defaults["guidance"], {}
    for name, steps, captions in (
        ("eval", extent.steps, extent.captions),
        ("eval-few-steps", extent.few, extent.few_captions),
    ):
        exam = draw_exam(captions)
        rows = metrics(exam, take(exam, pipe, reader, steps=steps, guidance_scale=guidance), reader)
        about = {"command": "python recipes/builtin/train.py evaluate", "captions": captions, "steps": steps}
        about |= {"guidance": guidance, "device": str(pipe.device), "dtype": str(pipe.dtype).removeprefix("torch.")}
        (folder / f"{name}.json").write_text(to_json(rows, about=about | {"machine": machine()}) + "\n")
        shares[name] = {(row.name, row.of): row.value / 100 for row in rows}
    return figures(shares["eval"], few=shares["eval-few-steps"])


def figures(many: dict[tuple[str, str], float], *, few: dict[tuple[str, str], float]) -> dict[str, float]:
    """What the gate asks for. Without a held-out combination among the captions there is none to fall behind."""
    right = many["caption accuracy", "all"]
    return {
        "right": right,
        "right at few steps": few["caption accuracy", "all"],
        "heldout less right": many.get(("caption accuracy", "2-3 objects, held-out combinations"), right) - right,
        "renders": many["reader right", "renders of the exam's scenes"],
    }
