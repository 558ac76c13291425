"""What a server is started with, as plain values: models, limits, replicas."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vivace.errors import InputError
from vivace.serve.http.settings import Settings
from vivace.serve.model import Spec

if TYPE_CHECKING:
    from vivace.serve.engine import Engine


class Plan(BaseModel):
    """What `vivace serve` makes of its options, and the `args` of the application in a Serve config file.

    What is about replicas counts on Ray alone, where all but `max_queue` is of each of them. No key is among them,
    because Ray shows them on its dashboard: that is VIVACE_API_KEY in the environment.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    models: dict[str, str] = Field(
        default={"builtin": "builtin"}, min_length=1
    )  # alias -> folder, file, hub id or builtin
    preset: str = "exact"
    loras: dict[str, str] = {}  # alias -> file
    dtype: str | None = None
    device: str | None = None
    few_step: bool = False  # every model with its few-step student

    max_running: int = Field(default=16, ge=1)  # requests that run at a time
    max_queue: int = Field(default=64, ge=1)  # requests that wait
    max_batch: int = Field(default=16, ge=1)  # requests that share a denoiser call
    memory: float | None = Field(default=None, gt=0)  # GiB of weights that stay loaded
    parked: float | None = Field(default=None, ge=0)  # GiB in host memory beyond that; None: half of what is free
    drain_seconds: float = Field(default=600, ge=0)  # for what runs when the end is asked for

    replicas: int = Field(default=1, ge=1)  # that always run
    max_replicas: int = Field(default=0, ge=0)  # that run when there is much to do; 0: no more than `replicas`
    gpus: float | None = Field(default=None, ge=0)  # of a replica; None: 1 where the cluster has some
    cpus: float = Field(default=1, gt=0)  # of a replica

    host: str = "127.0.0.1"
    allowed_hosts: tuple[str, ...] = ()
    folder: str | None = None  # of video jobs
    a1111: bool = False
    ui: bool = False  # the web page

    @model_validator(mode="after")
    def _grows(self) -> Plan:
        if self.max_replicas and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas is {self.max_replicas}, which is less than replicas, {self.replicas}")
        return self

    @property
    def most_replicas(self) -> int:
        return self.max_replicas or self.replicas

    @property
    def specs(self) -> dict[str, Spec]:
        loras = {alias: Path(path).expanduser() for alias, path in self.loras.items()}
        facts: dict[str, Any] = {name: getattr(self, name) for name in ("preset", "dtype", "device", "few_step")}
        return {alias: Spec(source=source, loras=loras, **facts) for alias, source in self.models.items()}

    def engine(self) -> Engine:
        """One engine for all the models. Raises InputError for a model that cannot be one."""
        from vivace.serve.engine import Engine

        sizes = {"memory": self.memory, "parked": self.parked}
        limits: dict[str, Any] = {"queue": self.max_queue, "threads": self.max_running, "batch": self.max_batch}
        limits |= {name: None if size is None else int(size * 2**30) for name, size in sizes.items()}
        return Engine(models=self.specs, **limits)

    def settings(self, *, api_key: str | None, port: int = 8000) -> Settings:
        """The HTTP routes' own. Raises InputError for a host that others reach without a key."""
        return Settings(
            host=self.host,
            port=port,
            api_key=api_key,
            allowed_hosts=self.allowed_hosts,
            folder=Path(self.folder).expanduser() if self.folder else None,
            a1111=self.a1111,
            ui=self.ui,
            drain_seconds=self.drain_seconds,
        )


def read_plan(fields: dict[str, object]) -> Plan:
    """A plan from plain values. Raises InputError that names the wrong one."""
    try:
        return Plan.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the plan"
        known = f"; there are {', '.join(Plan.model_fields)}" if first["type"] == "extra_forbidden" else ""
        got = "" if known or isinstance(first["input"], dict) else f", got {first['input']!r:.60}"
        raise InputError(f"{where}: {first['msg']}{got}{known}") from error
