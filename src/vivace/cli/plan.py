"""`vivace plan`: what a preset would do to a model, before any weight is read."""

from __future__ import annotations

from typing import Annotated

import typer


def plan(
    model: Annotated[str, typer.Argument(help="builtin, a folder, a .safetensors file, a hub id, FAMILY[:variant].")],
    preset: Annotated[str, typer.Option(help="exact, or another preset.")] = "exact",
    fields: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Config, repeatable.")
    ] = None,
    vram: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Device memory to keep within: 12GB, auto, or a level.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
) -> None:
    """Forecast what accelerating MODEL does here: passes, attention, bytes."""
    import json

    from vivace.cli.generate import quiet
    from vivace.config import parse_fields
    from vivace.plan import plan as forecast

    values = parse_fields(fields or ()) | ({"vram": vram} if vram else {})
    with quiet():
        found = forecast(model, preset, device=device, dtype=dtype, **values)
    print(json.dumps(found.to_dict()) if as_json else found)
