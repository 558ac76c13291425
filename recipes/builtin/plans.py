"""Compare plans: which steps are computed, and by what form the others are estimated, on captions that no table is of.

    python recipes/builtin/plans.py --captions 2000 --seed 1 --out benchmarks

Which steps: by the error of the final latent (power 1), which is nearest to exact in PSNR and saves where details are
drawn; by the errors as they are made (power 0), which leaves the details and strays early, to other pictures; by
something between; or every so many. Forms: weights fitted to the outputs of exact runs, and a line through the last two
outputs. `AMPLIFIED` in `vivace.cache.schedule` is what this showed to be best (-0.5 was tried too, and came out worse).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from paired import STEPS, Bench, beside_exact, options

from vivace.cache import calibrate
from vivace.cache.planned import Planned
from vivace.cache.policy import Policy
from vivace.cache.schedule import Choice, Errors, schedules, uniform
from vivace.cache.steps import Steps
from vivace.config import Config
from vivace.evals.builtin import draw_exam

FITTED = 32  # captions of exact runs, of yet another seed
POWERS = (1.0, 0.5, 0.0)
COUNTS = (14, 12)
FEWER = (28, 16, 14)  # steps of a solver, beside its plans


def main() -> None:
    asked = options(__doc__, name="plans")
    asked.add_argument(
        "--solver", help="plan for another scheduler than the model's, and set it beside with fewer steps"
    )
    given = asked.parse_args()
    solver, prefix = given.solver, f"{given.solver}, " if given.solver else ""
    bench = Bench(given)
    exact = bench.measure("exact", bench.ours(), role="exact")
    assert exact is not None
    errors, scheduler = observed(bench, seed=given.seed + 1, solver=solver)
    rows = [exact]
    for steps in FEWER if solver else ():
        row = bench.measure(f"{prefix}{steps} steps", bench.ours(solver=solver), role="control", steps=steps)
        rows += [row] if row else []
    for where, compute in places(errors):
        for form, policy in forms(compute, errors, scheduler=scheduler):
            name = f"{prefix}{len(compute)} of {STEPS} {where}, {form}"
            row = bench.measure(name, bench.ours(solver=solver, cache=policy), role="plan", of=str(compute))
            if row:
                rows.append({**row, "compute": compute})
    table = [beside_exact(row) for row in rows]
    seen = {"times": errors.times, "gain": errors.gain, "effect": errors.effect, "products": errors.products.tolist()}
    said = f" --solver {solver}" if solver else ""
    file = bench.write(table, name="plans", out=given.out, asked=said, of=solver or "", observed=seen)
    for row in table:
        low, high = row["difference_interval"]
        print(f"{row['name']}: {row['difference']:+.1f} points ({low:+.1f} to {high:+.1f}), {row['psnr']:.1f} dB, "
              f"worst {row['psnr_worst']:.1f}; {row.get('compute', '')}")  # fmt: skip
    print(file)


def observed(bench: Bench, *, seed: int, solver: str | None) -> tuple[Errors, str]:
    """What the exact runs of some captions show, and the class of the scheduler that stepped them."""
    captions = sorted(set(draw_exam(FITTED, seed=seed).captions))
    call = {"guidance_scale": 3.0, "width": 256, "height": 256}
    with bench.ours(solver=solver):
        runs = calibrate.Bench(pipe=bench.pipe, steps=STEPS, seed=seed, call=call, tell=print, config=Config())
        return calibrate.observe(runs, captions, [])[0], type(bench.pipe.scheduler).__name__


def places(errors: Errors) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every choice of steps to compute, with its name."""
    for power in POWERS:
        found = schedules(replace(errors, amplified=power))
        yield from ((f"by power {power:g}", found[count].compute) for count in COUNTS)
    yield from (("evenly", uniform(STEPS, count)) for count in COUNTS)


def forms(compute: tuple[int, ...], errors: Errors, *, scheduler: str) -> Iterator[tuple[str, Policy]]:
    """Every form of estimate at the steps between, with its name."""
    fitted = Choice(compute=compute, weights=errors.weights(compute), error=0.0)
    yield "fitted", Planned(plans=(calibrate.plan_of(fitted, errors, scheduler=scheduler),))
    yield "a line", Steps(compute="+".join(map(str, compute)), order=1)


if __name__ == "__main__":
    main()
