"""`vivace errors`: what 8 or 4 bits cost a model, by kind of layer."""

from __future__ import annotations

from typing import Annotated

import typer

from vivace.cli.command import command
from vivace.errors import InputError


def errors(
    family: Annotated[str, typer.Argument(metavar="FAMILY[:variant]", help="With random weights, unless --model.")],
    model: Annotated[str | None, typer.Option(help="Weights: a folder, a .safetensors file or a hub id.")] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="A tiny random model.")] = False,
    quant: Annotated[str, typer.Option(help="A format of linears, or none.")] = "fp8",
    attention: Annotated[str, typer.Option(help="An attention backend, or none.")] = "none",
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Width and height in pixels.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
) -> None:
    """Relative errors of one forward of FAMILY in few bits: of each kind of layer, and of the whole."""
    import json

    from vivace.attention import BACKENDS
    from vivace.bench.errors import errors_of
    from vivace.bench.workload import workload_of
    from vivace.cli.generate import quiet, read_size
    from vivace.load import resolve_device, resolve_dtype
    from vivace.machine import machine
    from vivace.quant import FORMATS

    for option, value, known in (("--quant", quant, FORMATS), ("--attention", attention, BACKENDS)):
        if value not in ("none", *known):
            raise InputError(f"{option} is none or one of {', '.join(known)}, got {value!r}")
    if quant == attention == "none":
        raise InputError("nothing to measure: --quant and --attention are both none; name one")
    place = resolve_device(device)
    number = str(resolve_dtype(dtype, place)).removeprefix("torch.")
    shape = {"size": read_size(size) if size else None, "model": model, "tiny": tiny}
    workload = workload_of(family, device=str(place), dtype=number, **shape)
    asked = {"quant": quant, "attention": attention}
    with quiet():
        found = errors_of(workload, **{name: None if value == "none" else value for name, value in asked.items()})
    if as_json:
        about = {"command": command(), "machine": machine(), "workload": workload.to_dict()}
        print(json.dumps({**about, "errors": found}))
        return
    for what, kinds in found.items():
        print(f"{workload.name}, {what}")
        for kind, error in kinds.items():
            print(f"  {error:7.2%}  {kind}")
