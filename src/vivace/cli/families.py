"""`vivace families`: the models vivace knows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from vivace.family import Family


def families(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list instead of the table.")] = False,
) -> None:
    """List the known model families, their variants and their pipeline classes."""
    import json

    from vivace.families import FAMILIES

    if as_json:
        print(json.dumps([_facts(family) for family in FAMILIES.values()]))
    else:
        from rich.console import Console

        # A line that is too narrow for a class name is wrapped by the terminal; rich would cut it.
        Console().print(_table(list(FAMILIES.values())), crop=False)


def _facts(family: Family) -> dict[str, Any]:
    """What a reader chooses a family and variant by, as plain values."""
    variants = {
        name: {
            "hub_id": variant.hub_id,
            "parameters": variant.parameters,
            "size": list(variant.size),
            "frames": variant.frames,
            "steps": variant.steps,
            "guidance": variant.guidance,
        }
        for name, variant in family.variants.items()
    }
    return {
        "name": family.name,
        "title": family.title,
        "media": family.media,
        "takes": sorted(family.takes),
        "variants": variants,
        "pipelines": list(family.pipelines),
    }


def _table(families: list[Family]) -> Table:
    from rich import box
    from rich.table import Column, Table

    # class names are for copying: the other column gives way first
    longest = max(len(name) for family in families for name in family.pipelines)
    table = Table("family", Column("pipelines", min_width=longest, overflow="fold"), box=box.SIMPLE_HEAD)
    for family in families:
        variants = [f"{name:16} {_short(variant.parameters)}" for name, variant in family.variants.items()]
        facts = "\n".join((f"[bold]{family.name}[/]: {family.title}", *variants))
        table.add_row(facts, "\n".join(family.pipelines), end_section=True)
    return table


def _short(count: int | None) -> str:
    """A parameter count in billions or millions."""
    if count is None:
        return "?"
    return f"{count / 1e9:5.1f} B" if count >= 1e9 else f"{count / 1e6:5.0f} M"
