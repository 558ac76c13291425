"""Serving: an engine that runs many requests on one device and batches their denoiser calls, and an HTTP API on top.

with Engine(models={"builtin": "builtin"}) as engine:
    job = engine.submit(Request(prompt="a red circle", seed=7))
    picture = job.result().pictures[0]
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vivace.serve.engine import Engine
    from vivace.serve.job import Job, Preview, Progress, Result
    from vivace.serve.model import Spec
    from vivace.serve.request import Request

_HOME = {
    "Engine": "vivace.serve.engine",
    "Job": "vivace.serve.job",
    "Preview": "vivace.serve.job",
    "Progress": "vivace.serve.job",
    "Request": "vivace.serve.request",
    "Result": "vivace.serve.job",
    "Spec": "vivace.serve.model",
}

__all__ = ["Engine", "Job", "Preview", "Progress", "Request", "Result", "Spec"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vivace.serve' has no attribute {name!r}; it has {', '.join(_HOME)}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value
