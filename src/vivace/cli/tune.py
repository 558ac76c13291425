"""`vivace tune`: measure what this model does best with on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vivace.cli.command import command


def tune(
    model: Annotated[str, typer.Argument(help="builtin, a folder, a .safetensors file, or a hub id.")],
    target_quality: Annotated[str | None, typer.Option(metavar="psnr=DB", help="The fastest this close.")] = None,
    target_speed: Annotated[str | None, typer.Option(metavar="Nx", help="The closest this fast.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file with one prompt a line; builtin draws its own.")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to write and to resume from.")] = Path(
        "tune"
    ),
    cache: Annotated[
        list[str] | None, typer.Option(metavar="POLICY[:k=v,...]", help="Only these step caches; repeatable.")
    ] = None,
    captions: Annotated[int, typer.Option(help="Captions that builtin draws.")] = 8,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; the model's own number where not given.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; the model's own where not given.")] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Width and height in pixels.")] = None,
    frames: Annotated[int | None, typer.Option(help="Of a video; the model's own where not given.")] = None,
    seed: Annotated[int, typer.Option(help="Draws the noise.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")] = None,
) -> None:
    """Measure presets, attention, graphs and step caches on MODEL; draw the frontier; print a Config.

    The frontier is of speed and quality. Ctrl-C keeps what was measured, and the same command goes on from there.
    """
    from vivace.cache import parse
    from vivace.cli.figures import call_of, prompts_of, settings_of, status
    from vivace.cli.generate import quiet
    from vivace.evals.contest import Order, contents_of
    from vivace.load import find, load_source
    from vivace.tune import read_target
    from vivace.tune import tune as run

    target = read_target(quality=target_quality, speed=target_speed)
    for spelled in cache or ():
        parse(spelled)
    source = find(model)
    settings = settings_of(source, steps=steps, guidance=guidance, seed=seed)
    texts = prompts_of(prompts, builtin=model == "builtin", captions=captions, seed=seed)
    order = Order(
        model=source.name, contents=contents_of(source), folder=output, prompts=texts, steps=settings["steps"],
        seed=seed, call=call_of(source, settings, size=size, frames=frames), device=device,
    )  # fmt: skip
    with quiet(), status() as tell:
        pipe = load_source(source, device=device)
        pipe.set_progress_bar_config(disable=True)
        contest = order.contest(pipe, prediction=source.prediction, tell=tell)
        tuned = run(contest, target, caches=cache)
    _write(tuned, contest, output)


def _write(tuned, contest, output: Path) -> None:
    """The frontier as JSON, PNG and a table, and the Config."""
    import json

    from rich.table import Table

    from vivace.cli.figures import show
    from vivace.evals import plot
    from vivace.evals.comparison import chart
    from vivace.machine import machine
    from vivace.tune import as_code, closeness

    names = [verdict.contestant.name for verdict in tuned.front]
    table = Table("contestant", title=f"{contest.model}: {len(contest.prompts)} prompts, {contest.steps} steps")
    for column in ("s", "speed", "PSNR, dB", "worst", "computed"):
        table.add_column(column, justify="right")
    for verdict in sorted(tuned.verdicts, key=lambda v: -(v.speedup or 0)):
        psnr = verdict.distances.get("PSNR")
        table.add_row(
            f"{'* ' if verdict.contestant.name in names else '  '}{verdict.contestant.name}",
            "" if verdict.seconds is None else f"{verdict.seconds:.3g}",
            "" if verdict.speedup is None else f"{verdict.speedup:.2f}",
            "" if psnr is None else f"{psnr.mean().item():.1f}",
            "" if psnr is None else f"{psnr.min().item():.1f}",
            "" if verdict.computed is None else f"{verdict.computed:.0%}",
        )
    plot.save(chart(tuned.verdicts, front=names), output / "frontier.png")
    chosen = tuned.chosen
    document = {
        "command": command(), "model": contest.model, "place": contest.place, "steps": contest.steps,
        "prompts": len(contest.prompts), "machine": machine(), "frontier": names, "refused": tuned.refused,
        "chosen": None if chosen is None else as_code(chosen.contestant.config),
        "verdicts": [verdict.to_dict() for verdict in tuned.verdicts],
    }  # fmt: skip
    (output / "tune.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    show(table)
    if tuned.refused:
        print(f"left out, for the reasons in tune.json: {'; '.join(tuned.refused)}")
    print(f"{output / 'frontier.png'}\n{output / 'tune.json'}")
    if chosen is None:
        print("nothing measured reaches the target; the table has what there is")
    else:
        close = "the reference itself" if not chosen.distances else f"{closeness(chosen):.1f} dB from it"
        print(f"{as_code(chosen.contestant.config)}  # {chosen.speedup:.2f} times as fast as exact, {close}")
