"""Admission: everything about a request that can be wrong is found before it waits."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import replace

from vivace.errors import InputError
from vivace.serve.backlog import Entry
from vivace.serve.failures import FieldError, UnknownModelError
from vivace.serve.job import Job
from vivace.serve.model import Model
from vivace.serve.prepare import prepare
from vivace.serve.request import Request


def admit(request: Request, models: Mapping[str, Model], *, most_pixels: int | None = None) -> Entry:
    """A request as a job, with what it needs; its seed is settled here. Raises InputError for one that cannot be done.

    `most_pixels`, of all its frames, also holds for a size that the model chooses.
    """
    if not isinstance(request, Request):
        raise InputError(f"{request!r:.100} is no request; give vivace.serve.Request(prompt=...)")
    model = model_of(models, request.model)
    prepared = prepare(request, model.source)
    if most_pixels is not None and (prepared.pixels or 0) > most_pixels:
        raise FieldError("size", f"that is {prepared.pixels} pixels in all; the most is {most_pixels}")
    mode = model.mode_of(request)
    seed = secrets.randbelow(2**32) if request.seed is None else request.seed
    job = Job(request, model=model.alias, seed=seed)
    # Such pipelines put attention processors into the shared denoiser while they run.
    if hasattr(prepared.pipeline, "set_pag_applied_layers"):
        mode = replace(mode, alone=job.id)
    warm = prepare(_one_step(request), model.source) if request.warm else None
    return Entry(job=job, prepared=prepared, warm=warm, model=model, mode=mode)


def _one_step(request: Request) -> Request:
    # Of an edit's steps only the share `strength` is taken: of one step that would be none.
    return replace(request, steps=1, strength=None if request.strength is None else 1.0)


def model_of(models: Mapping[str, Model], alias: str | None) -> Model:
    """The model of an alias; None: the first one. Raises UnknownModelError."""
    if alias is None:
        return next(iter(models.values()))
    if alias not in models:
        raise UnknownModelError("model", f"no model {alias!r}; there are {', '.join(models)}")
    return models[alias]
