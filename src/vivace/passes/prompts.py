"""Pass: the embeddings of the last prompts are kept."""

from __future__ import annotations

from types import SimpleNamespace

from vivace.one_off import give_class
from vivace.passes.encoders import encoders_of
from vivace.passes.target import Pass, Target
from vivace.prompts import Prompts


def _check(target: Target) -> str | None:
    if not encoders_of(target):
        return "there is no text encoder"
    # A plan has parts, and no pipeline yet.
    if not isinstance(target.subject, SimpleNamespace) and not hasattr(target.subject, "encode_prompt"):
        return f"a {type(target.subject).__name__} encodes its prompts in a way of its own"
    return None


def _apply(target: Target) -> None:
    encoders, stock = encoders_of(target), type(target.subject).encode_prompt
    target.prompts = Prompts(encoders, limit=int(target.config.prompts_mib * 2**20))
    target.undo.callback(give_class(target.subject, {"encode_prompt": target.prompts.method(stock)}))
    target.done("prompts", _forecast(target))


def _forecast(target: Target) -> str:
    return f"up to {target.config.prompts_mib:g} MiB of embeddings of the last prompts"


PROMPTS = Pass(
    name="prompts",
    why_here="after encoders: what they make as they are then is what is kept",
    wants=lambda config: config.prompts,
    check=_check,
    apply=_apply,
    forecast=_forecast,
)
