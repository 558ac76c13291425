"""Schedulers by name: a class name, or its short form such as `euler`, `ddim`, `dpmsolver-multistep`, `unipc`."""

from __future__ import annotations

import difflib
import inspect
from typing import TYPE_CHECKING, Any

from vivace.errors import InputError

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

    Raises InputError with the nearest names, and where the model's prediction and the scheduler do not go together.
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
    return chosen


def use_scheduler(pipe: DiffusionPipeline, name: str, *, prediction: str) -> None:
    """Give `pipe` the named scheduler, with the noise schedule it was trained on.

    Raises InputError where the model's prediction and the scheduler do not go together.
    """
    chosen: Any = scheduler_class(name, prediction=prediction)
    fields: dict[str, Any] = {}
    if prediction == "flow" and not _flow_only(chosen):
        fields = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        shift = getattr(pipe.scheduler.config, "shift", None)
        if shift is not None:
            fields["flow_shift"] = shift
    pipe.scheduler = chosen.from_config(pipe.scheduler.config, **fields)


def _flow_only(chosen: type) -> bool:
    return chosen.__name__.startswith("FlowMatch")
