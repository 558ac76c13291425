"""`vivace quantize`: a model's folder again, at half the size or less."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vivace.errors import InputError


def quantize(
    model: Annotated[str, typer.Argument(help="builtin, a pipeline folder, a .safetensors file or a hub id.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to write.")],
    quant: Annotated[str, typer.Option(help="fp8, int8, fp8_weights, int8_weights or int4_weights.")] = "fp8",
    dtype: Annotated[str, typer.Option(help="What stays in 16 bit: bfloat16 or float16.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="Where to quantise: cpu, cuda or cuda:N.")] = "cpu",
    variant: Annotated[
        str | None, typer.Option(help="Weight variant of a folder (fp16), or which model a file is.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace a folder that quantize wrote before.")] = False,
) -> None:
    """Write MODEL with its denoiser in 8 or 4 bits, for `--model DIR` and `vivace.load(DIR)`."""
    import json

    from vivace.quant import FORMATS

    if quant not in FORMATS:
        raise InputError(f"--quant is one of {', '.join(FORMATS)}, got {quant!r}")
    if output.is_file() or (output.is_dir() and any(output.iterdir()) and not overwrite):
        raise InputError(f"{output} exists; name a new folder, or --overwrite one that quantize wrote")
    from vivace.accelerate import accelerate, acceleration_of
    from vivace.cli.generate import quiet
    from vivace.load import find, load_source
    from vivace.quant import folder
    from vivace.report import report

    source = find(model, variant=variant)
    if source.path is not None and source.path.resolve().is_relative_to(output.resolve()):
        raise InputError(f"{output} is where the model itself lies; name another folder")
    folder.check_replaceable(output)
    with quiet():
        pipe = load_source(source, dtype=dtype, device=device, variant=variant)
        accelerate(pipe, quant=quant, keep_base="no", fuse="off", compile="off", graphs="off")
        acceleration = acceleration_of(pipe)
        assert acceleration is not None
        folder.write(pipe, output, denoisers=acceleration.target.denoisers, own=source.own)
    made = report(pipe)
    sizes = {name: (output / name / folder.WEIGHTS).stat().st_size for name in made.layers}
    if as_json:
        print(json.dumps({"folder": str(output), "bytes": sizes, "layers": made.to_dict()["layers"]}))
        return
    print(next(note.detail for note in made.passes if note.name == "quant"))
    for name, size in sizes.items():
        print(f"{output / name / folder.WEIGHTS}  {size / 2**20:.1f} MiB")
