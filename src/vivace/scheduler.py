"""Schedulers by name: a class name, or its short form such as `euler`, `ddim`, `dpmsolver-multistep`, `unipc`."""

from __future__ import annotations

import difflib
import functools
import inspect
from typing import TYPE_CHECKING, Any

from vivace.errors import InputError, first_line

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


# What people call them where that is not the class name's own short form.
ALIASES = {
    "unipc": "unipcmultistep",
    "dpmpp": "dpmsolvermultistep",
    "dpm": "dpmsolvermultistep",
    "eulera": "eulerancestral",
}


def short_name(name: str) -> str:
    """`EulerAncestralDiscreteScheduler` -> `eulerancestral`; any spelling of a short name maps to the same word."""
    word = "".join(letter for letter in name.lower() if letter.isalnum())
    word = word.removesuffix("scheduler").removesuffix("discrete")
    return ALIASES.get(word, word)


def scheduler_class(name: str, *, prediction: str) -> type:
    """The diffusers scheduler class for `name`; for flow models `euler` means the flow-matching one.

    Raises InputError with the nearest names, and where the model's prediction and the scheduler do not go together, or
    a pipeline's loop cannot step it.
    `prediction` is a family's: "epsilon", "v" or "flow".
    """
    import diffusers

    by_short = {short_name(n): n for n in dir(diffusers) if n.endswith("Scheduler")}
    word = short_name(name)
    if prediction == "flow" and f"flowmatch{word}" in by_short:
        word = f"flowmatch{word}"
    if word not in by_short:
        near = difflib.get_close_matches(word, by_short, n=3, cutoff=0.0)
        names = ", ".join(f"{by_short[n]} ({n})" for n in near)
        raise InputError(f"no scheduler {name!r}; the nearest are {names}")
    chosen: Any = getattr(diffusers, by_short[word])
    flow_only = _flow_only(chosen)
    if (
        prediction == "flow"
        and not flow_only
        and "use_flow_sigmas" not in inspect.signature(chosen.__init__).parameters
    ):
        raise InputError(f"{chosen.__name__} cannot run a flow model; use euler, heun, dpmsolvermultistep or unipc")
    if prediction != "flow" and flow_only:
        raise InputError(f"{chosen.__name__} is for flow models; use euler, ddim, dpmsolvermultistep or unipc")
    if why := _no_step(chosen):
        raise InputError(f"{chosen.__name__} cannot run here: {why}; use euler, dpmsolvermultistep or unipc")
    return chosen


def use_scheduler(pipe: DiffusionPipeline, name: str, *, prediction: str) -> None:
    """Give `pipe` the named scheduler, with the noise schedule it was trained on.

    Raises InputError where the model's prediction, or its noise schedule, and the scheduler do not go together.
    """
    chosen: Any = scheduler_class(name, prediction=prediction)
    fields: dict[str, Any] = {}
    if prediction == "flow" and not _flow_only(chosen):
        fields = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        shift = getattr(pipe.scheduler.config, "shift", None)
        if shift is not None:
            fields["flow_shift"] = shift
    try:
        pipe.scheduler = chosen.from_config(pipe.scheduler.config, **fields)
    except (ValueError, TypeError, NotImplementedError) as error:
        told = f"{chosen.__name__} does not take this model's noise schedule: {first_line(error)}"
        raise InputError(f"{told}; use euler, dpmsolvermultistep or unipc") from error


@functools.cache
def _no_step(chosen: Any) -> str | None:
    """Why a loop that denoises latents cannot step a scheduler, or None: diffusers has some for other loops."""
    import torch

    x = torch.zeros(1, 4, 8, 8)
    try:
        scheduler = chosen()
        shift = {"mu": 1.0} if getattr(scheduler.config, "use_dynamic_shifting", False) else {}
        scheduler.set_timesteps(8, **shift)
        first = scheduler.timesteps[0]
        scheduler.step(x, first, scheduler.scale_model_input(x, first) if not _flow_only(chosen) else x)
    except ImportError as error:
        return first_line(error).partition(" but ")[0]  # "X requires the scipy library but it was not found ..."
    except Exception:  # whatever another loop would have given it
        return "it is made for another kind of loop"
    return None


def _flow_only(chosen: type) -> bool:
    return chosen.__name__.startswith("FlowMatch")
