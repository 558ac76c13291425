"""`vivace bench`: how fast, how cold, how much memory, how exact, beside the peers."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from vivace.cli.command import command
from vivace.config import PRESETS, resolve
from vivace.errors import InputError

DEFAULT_PEERS = {True: ("eager", "compile", "compile-full"), False: ("eager",)}
"""On a GPU, and elsewhere: compiling for a CPU takes longer than it saves."""
LIMIT = 200.0  # seconds that a contestant may take


def bench(
    families: Annotated[list[str] | None, typer.Argument(metavar="FAMILY[:variant]", help="What to time.")] = None,
    model: Annotated[str | None, typer.Option(help="Weights: a folder, a .safetensors file or a hub id.")] = None,
    random: Annotated[bool, typer.Option("--random", help="Random weights at true size (the default).")] = False,
    tiny: Annotated[bool, typer.Option("--tiny", help="A tiny random model, to try the bench itself.")] = False,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Width and height in pixels.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Samples in one forward.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of a video.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps, with --end-to-end.")] = None,
    presets: Annotated[
        str | None,
        typer.Option(
            metavar="A,B", help="Ours: exact; with --ladder all. 'fast keep_base=no' has a field of its own. Or none."
        ),
    ] = None,
    fields: Annotated[list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="For each of ours.")] = None,
    peers: Annotated[
        str | None, typer.Option(metavar="A,B", help="eager, compile, compile-full, torchao, cache-dit; or none.")
    ] = None,
    end_to_end: Annotated[bool, typer.Option("--end-to-end", help="Text encoders, all steps, VAE.")] = False,
    control: Annotated[
        bool, typer.Option("--control", help="With a ControlNet; without --end-to-end what it hands over.")
    ] = False,
    kernels: Annotated[bool, typer.Option("--kernels", help="Every kernel against its bandwidth bound.")] = False,
    ladder: Annotated[
        str | None, typer.Option(metavar="NAME", help="Rung by rung: sdxl, sd15, ssd1b, pixart, flux or builtin.")
    ] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Under load, beside a lock around stock and one of ours.")
    ] = False,
    ray: Annotated[
        bool, typer.Option("--ray", help="With --serve: Ray's replicas beside the plain server, and killed ones.")
    ] = False,
    concurrency: Annotated[str, typer.Option(metavar="N,N", help="Clients at a time, with --serve.")] = "1,4,16",
    pictures: Annotated[
        int, typer.Option(min=4, help="Asked of each server, with --serve; more where a client would have few.")
    ] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Turns that these are asked in, with --serve.")] = 6,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also where the time goes: traces; with --serve what Python costs.")
    ] = False,
    limit_s: Annotated[float, typer.Option(min=1, help="Seconds a contestant may take.")] = LIMIT,
    budget_s: Annotated[float | None, typer.Option(min=0, help="Seconds all may take; the rest next time.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Also what has a result already.")] = False,
    no_reference: Annotated[
        bool,
        typer.Option("--no-reference", help="No fp32 call of each model, and so no errors: seconds for large ones."),
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Where results are kept.")] = Path(
        "out/bench"
    ),
) -> None:
    """Time models beside their peers, each contestant in a process of its own; continues where it stopped."""
    began = time.monotonic()  # what is imported now takes seconds too
    from vivace.bench.contestant import contestants_of
    from vivace.bench.kernels import bench_kernels
    from vivace.bench.place import place
    from vivace.bench.results import write
    from vivace.bench.run import Bench
    from vivace.bench.workload import workload_of
    from vivace.cli.figures import check_folder
    from vivace.cli.generate import read_size

    check_folder(output, option="-o")
    if ray and not serve:
        raise InputError("--ray needs --serve; add it, or leave --ray out")
    if serve:
        given = {"--batch": batch, "--frames": frames, "--set": fields, "--peers": peers, "--ladder": ladder}
        given |= {
            "--end-to-end": end_to_end,
            "--kernels": kernels,
            "--limit-s": limit_s != LIMIT,
            "--control": control,
            "--no-reference": no_reference,
        }
        given |= {"FAMILY beside --model": model and families, "--random beside --model": model and random}
        on_ray = {"--presets": presets, "--tiny": tiny, "--profile": profile, "--again": again, "--budget-s": budget_s}
        given |= {**on_ray, "--device": device, "--dtype": dtype} if ray else {}
        if extra := [name for name, value in given.items() if value]:
            raise InputError(f"--serve{' --ray' if ray else ''} takes no {', '.join(extra)}; leave it out")
        if not (ours := _names(presets or "exact")):
            raise InputError("--serve has nobody to time with --presets none; name one, such as exact")
        for preset in ours:
            resolve(preset)  # a wrong one comes out before the others are measured
        shape = {"size": read_size(size) if size else None, "concurrency": _clients(concurrency), "rounds": rounds}
        options = {"steps": _around(steps), "pictures": pictures, "folder": output, "command": command(), **shape}
        place = {"device": device, "dtype": dtype, "tiny": tiny}
        names = (model,) if model else families or ("builtin",)
        if ray:
            for name in names:
                _serve_on_ray(name, **options)
        else:
            each = {"profile": profile, "again": again, **place, **options}
            _serve(
                [(name, preset) for name in names for preset in ours],
                allowed={"seconds": budget_s, "began": began},
                **each,
            )
        return
    if ladder:
        given = {"FAMILY": families, "--batch": batch, "--frames": frames, "--peers": peers}
        given |= {
            "--kernels": kernels,
            "--profile": profile,
            "--random": random,
            "--control": control,
            "--no-reference": no_reference,
        }
        if extra := [name for name, value in given.items() if value]:
            raise InputError(f"--ladder has its own inputs and rungs, and takes no {', '.join(extra)}; leave it out")
        shape = {"size": read_size(size) if size else None, "steps": steps, "model": model, "tiny": tiny}
        times = {"limit": limit_s, "budget": budget_s, "again": again}
        presets = presets or ",".join(PRESETS)
        options = {"presets": _names(presets), "fields": fields or (), "place": (device, dtype), "folder": output}
        _climb(ladder, **options, **shape, **times)
        return
    if model and random:
        raise InputError("--model and --random exclude each other; give one")
    if tiny and random:
        raise InputError("--tiny and --random exclude each other: one is a small model, one of true size; give one")
    if not families and not kernels:
        raise InputError("nothing to time; name a family (vivace families lists them), or give --kernels")
    if steps and not end_to_end:
        raise InputError(f"--steps {steps} says nothing about one denoiser forward; add --end-to-end, or leave it out")
    if batch and end_to_end:
        raise InputError(f"--batch {batch} is of one denoiser forward; --end-to-end makes one picture, so leave it out")
    shape = {"size": read_size(size) if size else None, "batch": batch, "frames": frames, "steps": steps}
    options = {"model": model, "tiny": tiny, "end_to_end": end_to_end, "control": control, **shape}
    drafts = [workload_of(name, device="", dtype="", **options) for name in families or ()]
    contest = partial(contestants_of, presets=_names(presets or "exact"), fields=fields or ())
    contest(peers=_names(peers or ""))  # wrong names come out before the machine is asked, which takes seconds
    here = place(device=device, dtype=dtype)
    workloads = [replace(draft, device=here.device, dtype=here.dtype) for draft in drafts]
    contestants = contest(peers=DEFAULT_PEERS[here.gpu] if peers is None else _names(peers))
    if workloads and not contestants:
        raise InputError("nobody to time: --presets and --peers are both none; name one")

    def on_line(line: Mapping[str, Any]) -> None:
        print(_sentence(line), flush=True)
        write(output)

    told = {"folder": output, "machine": here.machine, "command": command(), "on_line": on_line}
    if kernels and not here.gpu:
        raise InputError(f"--kernels times CUDA kernels, and the device is {here.device}; leave it out")
    if kernels:
        bench_kernels(seconds=limit_s, **told)
    left = Bench(
        workloads=workloads,
        contestants=contestants,
        limit=limit_s,
        budget=budget_s,
        again=again,
        trace=profile,
        reference=not no_reference,
        **told,
    ).run()
    write(output)
    if left:
        print(f"{left} left for the next time, when the same command goes on")
    print(output / "bench.md")


def _serve(subjects: Sequence[tuple[str, str]], *, allowed: Mapping[str, Any], **options: Any) -> None:
    """The load on the servers of each model and preset, within one budget."""
    from vivace.bench.allowance import Allowance, NoTime
    from vivace.bench.serve import run

    budget = Allowance(**allowed)
    for index, (name, preset) in enumerate(subjects):
        try:
            path, left = run(name, preset=preset, allowed=budget, on_line=_say, **options)
        except NoTime:
            if not index:
                raise
            print(f"{name} with {preset} is left for the next time, when the same command goes on")
            continue
        print(path.with_suffix(".md").read_text(), path, sep="\n")
        if left:
            print(f"{left} left for the next time, when the same command goes on")


def _serve_on_ray(name: str, *, concurrency: list[int], **options: Any) -> None:
    """The load of the largest number of clients on the plain server and on Ray's."""
    from vivace.bench.cluster import run

    path = run(name, concurrency=max(concurrency), on_line=_say, **options)
    print(path.with_suffix(".md").read_text(), path, sep="\n")


def _clients(text: str) -> list[int]:
    """`1,4,16` -> its numbers. Raises InputError."""
    parts = _names(text)
    if not parts or not all(part.isdecimal() and int(part) for part in parts):
        raise InputError(f"--concurrency {text!r} is not a list of numbers of clients; write it like 1,4,16")
    return [int(part) for part in parts]


def _around(steps: int | None) -> tuple[int, int]:
    """The least and the most steps that are asked for."""
    return (max(1, steps - steps // 4), steps + steps // 4) if steps else (15, 25)


def _climb(
    name: str,
    *,
    presets: tuple[str, ...],
    fields: Sequence[str],
    place: tuple[str | None, str | None],
    folder: Path,
    limit: float,
    budget: float | None,
    again: bool,
    **shape: Any,
) -> None:
    """One ladder: its rungs below, our presets on top, each in a process of its own."""
    from vivace.bench import place as places
    from vivace.bench.ladder import write
    from vivace.bench.run import Bench
    from vivace.bench.rungs import LADDERS, rungs_of
    from vivace.bench.workload import workload_of

    if name not in LADDERS:
        raise InputError(f"unknown ladder {name!r}; --ladder takes {', '.join(LADDERS)}")
    if name == "builtin":
        shape = {**shape, "model": "builtin"}
    draft = workload_of(LADDERS[name], device="", dtype="", end_to_end=True, **shape)
    rungs_of(draft, presets=presets, fields=fields)
    here = places.place(device=place[0], dtype=place[1])
    workload = replace(draft, device=here.device, dtype=here.dtype)

    def on_line(line: Mapping[str, Any]) -> None:
        print(_sentence(line), flush=True)
        write(folder, name=name, workload=workload)

    left = Bench(
        workloads=[workload],
        contestants=rungs_of(workload, presets=presets, fields=fields),
        folder=folder,
        machine=here.machine,
        command=command(),
        limit=limit,
        budget=budget,
        again=again,
        on_line=on_line,
    ).run()
    chart = write(folder, name=name, workload=workload)
    if left:
        print(f"{left} rungs left for the next time, when the same command goes on")
    if chart.is_file():  # a budget may end before the first rung
        print(chart)


def _say(line: Mapping[str, Any]) -> None:
    """One server in one round."""
    rate = f"{len(line['latencies']) / line['seconds']:.2f} images/s"
    print(f"round {line['round'] + 1}, {line['concurrency']} at a time: {line['server']}: {rate}", flush=True)


def _names(text: str) -> tuple[str, ...]:
    """`a,b` -> its names; `none` and nothing are none."""
    return tuple(name.strip() for name in text.split(",") if name.strip() not in ("", "none"))


def _sentence(line: Mapping[str, Any]) -> str:
    """One result in one line."""
    from vivace.bench.table import duration

    if "kernel" in line:
        found = f"{line['microseconds']:.1f} us, {line['share']:.0%} of its bound" if "share" in line else line["why"]
        return f"{line['kernel']}, {line['case']}: {found}"
    if line["status"] != "done":
        return f"{line['title']}: {line['contestant']}: {line['status']}: {line['why']}"
    error = "" if line["error"] is None else f", error {line['error']:.2e}"
    cold = f"cold {line['cold_seconds']:.1f} s"
    return f"{line['title']}: {line['contestant']}: {duration(line['median_ms'])}, {cold}{error}"
