"""Compare plans that count more or less of what later steps make of an error, on captions that no table is of.

    python recipes/builtin/plans.py --captions 1000 --seed 1 --out benchmarks

A plan by the error of the final latent (power 1) is nearest to exact in PSNR, and saves where details are drawn; one by
the errors as they are made (power 0) leaves the details and strays early, to other pictures. Beside them an even mask,
with weights fitted alike. `AMPLIFIED` in `vivace.cache.schedule` is what this showed to be best.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from paired import STEPS, Bench, beside_exact, options

import vivace
from vivace.cache import calibrate
from vivace.cache.planned import Planned
from vivace.cache.schedule import Choice, Errors, schedules, uniform
from vivace.config import Config
from vivace.evals.builtin import draw_exam

FITTED = 32  # captions of exact runs, of yet another seed
POWERS = (1.0, 0.75, 0.5, 0.25, 0.0)
COUNTS = (14, 12, 10)


def main() -> None:
    given = options(__doc__, name="plans")
    bench = Bench(given)
    exact = bench.measure("exact", bench.ours(), role="exact")
    assert exact is not None
    errors = observed(bench, seed=given.seed + 1)
    scheduler = type(bench.pipe.scheduler).__name__
    rows = [exact]
    for name, choice in choices(errors):
        plan = calibrate.plan_of(choice, errors, scheduler=scheduler)
        row = bench.measure(name, bench.ours(cache=Planned(plans=(plan,))), role="plan", of=str(choice.compute))
        if row:
            rows.append({**row, "compute": choice.compute})
    table = [beside_exact(row, exact) for row in rows]
    file = bench.write(table, name="plans", out=given.out)
    for row in table:
        low, high = row["difference_interval"]
        print(f"{row['name']}: {row['difference']:+.1f} points ({low:+.1f} to {high:+.1f}), {row['psnr']:.1f} dB, "
              f"worst {row['psnr_worst']:.1f}; {row.get('compute', '')}")  # fmt: skip
    print(file)


def observed(bench: Bench, *, seed: int) -> Errors:
    """What the exact runs of some captions show."""
    captions = sorted(set(draw_exam(FITTED, seed=seed).captions))
    call = {"guidance_scale": 3.0, "width": 256, "height": 256}
    vivace.accelerate(bench.pipe)
    try:
        runs = calibrate.Bench(pipe=bench.pipe, steps=STEPS, seed=seed, call=call, tell=print, config=Config())
        return calibrate.observe(runs, captions, [])[0]
    finally:
        vivace.restore(bench.pipe)


def choices(errors: Errors) -> Iterator[tuple[str, Choice]]:
    """Every plan that is compared, with its name."""
    for power in POWERS:
        found = schedules(replace(errors, amplified=power))
        yield from ((f"power {power:g}, {count} of {STEPS}", found[count]) for count in COUNTS)
    for count in COUNTS:
        even = uniform(STEPS, count)
        yield f"even, {count} of {STEPS}", Choice(compute=even, weights=errors.weights(even), error=0.0)


if __name__ == "__main__":
    main()
