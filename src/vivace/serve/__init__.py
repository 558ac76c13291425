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
    from vivace.serve.failures import Busy, Cancelled, DeadlineExceeded, Failure, OutOfMemory, Unavailable
    from vivace.serve.job import Job, Preview, Progress, Result
    from vivace.serve.model import Spec
    from vivace.serve.request import Request

_HOME = {
    "Busy": "vivace.serve.failures",
    "Cancelled": "vivace.serve.failures",
    "DeadlineExceeded": "vivace.serve.failures",
    "Engine": "vivace.serve.engine",
    "Failure": "vivace.serve.failures",
    "Job": "vivace.serve.job",
    "OutOfMemory": "vivace.serve.failures",
    "Preview": "vivace.serve.job",
    "Progress": "vivace.serve.job",
    "Request": "vivace.serve.request",
    "Result": "vivace.serve.job",
    "Spec": "vivace.serve.model",
    "Unavailable": "vivace.serve.failures",
}

__all__ = [
    "Busy",
    "Cancelled",
    "DeadlineExceeded",
    "Engine",
    "Failure",
    "Job",
    "OutOfMemory",
    "Preview",
    "Progress",
    "Request",
    "Result",
    "Spec",
    "Unavailable",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vivace.serve' has no attribute {name!r}; it has {', '.join(_HOME)}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value
