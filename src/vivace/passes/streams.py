"""Pass: what does not wait for one another in a block beside one another, in CUDA graphs."""

from __future__ import annotations

from vivace.fused import fused_of
from vivace.graph import Graphs
from vivace.passes.fuse import check_fuse
from vivace.passes.graphs import check_graphs
from vivace.passes.target import Pass, Target


def _check(target: Target) -> str | None:
    if target.config.streams == "off":
        return "switched off"
    fused = fused_of(target.family)
    if fused is None or not fused.abreast or check_fuse(target) is not None:
        return "nothing in its blocks stands beside something else"
    if (why := check_graphs(target)) is not None:
        return f"it is for CUDA graphs: {why}"
    if target.config.streams == "auto":
        return "not measured to win yet; streams='on' asks for it"
    return None


def _apply(target: Target) -> None:
    for lane in target.lanes.values():
        assert isinstance(lane.run, Graphs)
        lane.run.abreast = True
    target.done("streams", _forecast(target))


def _forecast(target: Target) -> str:
    return "text and picture of a joint block, each on its own"


STREAMS = Pass(
    name="streams",
    why_here="after graphs: it is how they are recorded",
    wants=lambda config: config.streams,
    check=_check,
    apply=_apply,
    forecast=_forecast,
)
