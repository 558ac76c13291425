"""`vivace merge`: a model with LoRAs in its weights, as a new folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vivace.cli.generate import quiet, read_lora


def merge(
    model: Annotated[str, typer.Argument(help="builtin, a pipeline folder, a .safetensors file or a hub id.")],
    loras: Annotated[list[str], typer.Argument(metavar="LORA[:weight]...", help="LoRA files, added in this order.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="The folder to write; must not exist.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; else as the model is stored.")
    ] = None,
    variant: Annotated[str | None, typer.Option(help="A weight variant of the folder or hub id, such as fp16.")] = None,
) -> None:
    """Write a model with LoRAs merged into its weights."""
    from vivace.lora.merge import merge

    added = [read_lora(text) for text in loras]
    with quiet():
        folder = merge(model, added, output=output, dtype=dtype, variant=variant)
    print(folder)
