"""Choose guidance and shift on validation captions, and write the stock pipeline and the reader that ship.

    python recipes/builtin/publish.py WEIGHTS --to FOLDER [--guidance 3 --shift 3]

WEIGHTS is the folder that the stages of training exported to; all parts are taken from it: reader, autoencoder, text
encoders and transformer. FOLDER receives model/ and reader.safetensors, as src/vivace/builtin holds them. Prints every
setting tried, as JSON, a line each.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from itertools import product
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from diffusers import AutoencoderTiny
from extent import FULL, Extent
from parts import assemble, export, transformer
from quiz import quiz
from student import Student
from train_transformer import weights_of
from widen import widen

from vivace.builtin.reader import Reader, load_reader

MEGABYTE = 1e6


def publish(
    weights: Path,
    *,
    to: Path,
    device: str,
    extent: Extent = FULL,
    guidance: float | None = None,
    shift: float | None = None,
) -> dict[str, float]:
    """Write what ships; give what the chosen setting draws right, where it was chosen, and the size on disk."""
    student = Student()
    student.load_state_dict(weights_of(weights))
    vae = AutoencoderTiny.from_pretrained(weights / "vae")
    figures = {}
    if guidance is None or shift is None:
        reader = load_reader(weights / "reader.safetensors", device=device)
        guidance, shift, figures = choose(student.to(device), vae.to(device), reader, extent)
    denoiser = transformer()
    denoiser.load_state_dict(student.denoiser.state_dict())
    model = to / "model"
    pipe = assemble(vae.cpu(), denoiser, (student.clip.cpu(), student.least.cpu()), shift=shift)
    widen(pipe)
    export(pipe, model)
    defaults = {"steps": extent.steps, "guidance": guidance, "size": [256, 256], "longest": 256}
    (model / "vivace.json").write_text(json.dumps(defaults) + "\n")
    if to.resolve() != weights.resolve():
        shutil.copy(weights / "reader.safetensors", to)
    sizes = [file.stat().st_size / MEGABYTE for file in (*model.rglob("*"), to / "reader.safetensors")]
    return figures | {"megabytes": sum(sizes), "megabytes of the largest file": max(sizes)}


def choose(
    student: Student, vae: AutoencoderTiny, reader: Reader, extent: Extent
) -> tuple[float, float, dict[str, float]]:
    """The guidance and the shift that draw most validation captions right at many and at few steps together; how many.

    At few steps the shift decides: patterned backgrounds take their phase while there is little but noise.
    """
    found = {}
    for guidance, shift in product(extent.guidances, extent.shifts):
        settings = {"n": extent.chosen, "seed": 905, "pool": extent.pool, "guidance": guidance, "shift": shift}
        many, few = (
            quiz(student, vae, reader, heldout="with", steps=steps, **settings) for steps in (extent.steps, extent.few)
        )
        found[guidance, shift] = {"right": many["right"], "right at few steps": few["right"]}
        print(json.dumps({"guidance": guidance, "shift": shift, "many": many, "few": few}), flush=True)
    best = max(found, key=lambda setting: sum(found[setting].values()))
    return *best, found[best]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--shift", type=float)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    chosen = {"guidance": given.guidance, "shift": given.shift}
    print(json.dumps(publish(given.weights, to=given.to, device=given.device, **chosen)))


if __name__ == "__main__":
    main()
