"""The application on Ray Serve: `build` is what `vivace serve --ray`, `serve run` and a RayService start."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ReplicaState
from starlette.datastructures import Headers, MutableHeaders

from vivace.cluster.connect import gpus
from vivace.serve.cluster.fleet import Fleet
from vivace.serve.cluster.inside import stay_inside
from vivace.serve.cluster.replica import Replica
from vivace.serve.cluster.tabs import Tabs, beats
from vivace.serve.http.app import create_app
from vivace.serve.http.log import configure
from vivace.serve.http.settings import Settings
from vivace.serve.model import Model
from vivace.serve.plan import Plan, read_plan

logger = logging.getLogger(__name__)

NAME = "vivace"  # of the application
HEAD = "node:__internal_head__"  # a resource that Ray gives to the machine of its head alone
MOST_AT_DOOR = 10_000  # HTTP requests at a time: its own limits refuse earlier, and in the API's words
LONGEST_NAME = 64  # of a request, which a client may have chosen, in the log
OWN = {"env_vars": {"DIFFUSERS_DISABLE_REMOTE_CODE": "1"}}
"""The environment of our processes, which is theirs before anything is imported: no model may bring code of its own."""
PACE = {"upscale_delay_s": 10.0, "downscale_delay_s": 300.0, "metrics_interval_s": 5.0, "look_back_period_s": 10.0}
"""How soon there are more replicas, and fewer: a replica takes as long to come as its weights take to load."""
LOOK, SOON = 5.0, 1.0
"""Seconds between two looks at how many replicas run, and while they are fewer than always should: for each, Ray's
controller describes all of Serve, which takes the processor from who draws."""


@serve.ingress()
class Door:
    """The HTTP application: keys, limits, validation, records of videos. It holds no weights and needs no GPU."""

    def __init__(self, replicas: DeploymentHandle, plan: dict[str, object], settings: Settings) -> None:
        configure()
        stay_inside()
        wanted = read_plan(plan)
        self._settings, self._replicas, self._alive = settings, replicas, 0
        self._answering = 0  # HTTP requests
        self._tabs = Tabs()
        limits = {"queue": wanted.max_queue, "places": wanted.max_running, "replicas": wanted.most_replicas}
        self.fleet = Fleet(replicas, wanted.specs, alive=lambda: self._alive, **limits)
        self._looking = asyncio.get_running_loop().create_task(self._look(wanted.replicas))

    def __serve_build_asgi_app__(self) -> Any:
        """What Ray calls for the application, in the replica."""
        app = create_app(self.fleet, self._settings, warm=False)

        async def counted(scope: Any, receive: Any, send: Any) -> None:
            self._answering += 1
            try:
                await app(scope, receive, send)
            finally:
                self._answering -= 1

        async def answer(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "http":  # the application's own life is one long call
                await app(scope, receive, send)
            elif beats(scope):
                await self._tabs.answer(app, *_with_rays_name(scope, receive, send))
            else:
                await counted(*_with_rays_name(scope, receive, send))

        return answer

    async def drain(self) -> None:
        """Take no more requests; those that wait fail, those that run go on. Pages stay open and learn no more."""
        self.fleet.drain()
        self._tabs.end()

    async def busy(self) -> int:
        """Requests that are not over, and answers that are still on their way out."""
        return self.fleet.unfinished + self._answering

    async def facts(self) -> dict[str, Any]:
        """What waits and runs, the processes that draw, and how many requests had to be sent again."""
        fleet = self.fleet
        counts = {"queued": fleet.queued, "running": fleet.running, "unfinished": fleet.unfinished}
        return {**counts, "retried": fleet.retried, "drawing": fleet.drawing, "replicas": self._alive}

    async def _look(self, wanted: int) -> None:
        while True:
            try:
                self._alive = await asyncio.to_thread(running, self._replicas.deployment_name)
            except Exception as error:  # Ray's controller restarts now and then; the count stays as it was
                logger.warning("the replicas cannot be counted: %s", type(error).__name__)
            await asyncio.sleep(LOOK if self._alive >= wanted else SOON)


def _with_rays_name(scope: Any, receive: Any, send: Any) -> tuple[Any, Any, Any]:
    """A request under the id that Ray gives it and puts into its answer, lest there be two."""
    name = Headers(scope=scope).get("x-request-id")
    if name is None:
        return scope, receive, send
    scope.setdefault("state", {})["request_id"] = name[:LONGEST_NAME]

    async def answer(message: Any) -> None:
        if message["type"] == "http.response.start":
            del MutableHeaders(scope=message)["x-request-id"]
        await send(message)

    return scope, receive, answer


def running(deployment: str = Replica.__name__, *, application: str = NAME) -> int:
    """Replicas of a deployment that take requests."""
    found = serve.status().applications.get(application)
    states = found.deployments[deployment].replica_states if found and deployment in found.deployments else {}
    return states.get(ReplicaState.RUNNING, 0)


def build(args: dict[str, Any]) -> Application:
    """The application of a Serve config file: `args` are the fields of a Plan. Raises InputError."""
    return application(read_plan(args), api_key=os.environ.get("VIVACE_API_KEY"))


def application(plan: Plan, *, api_key: str | None, port: int = 8000) -> Application:
    """One door, and the replicas that the plan asks for. Raises InputError."""
    settings = plan.settings(api_key=api_key, port=port)
    for alias, spec in plan.specs.items():
        Model(alias, spec)  # what cannot be a model is found here, not by a replica
    given = plan.model_dump()
    quiet = {"enable_access_log": False, "log_level": "WARNING"}  # the door has a log of requests
    replicas = serve.deployment(Replica).options(
        logging_config=quiet,
        ray_actor_options={"num_cpus": plan.cpus, "num_gpus": cards(plan), "runtime_env": OWN},
        max_ongoing_requests=plan.max_running,
        # The door refuses at `max_queue`; what was taken and is sent again must find room beyond that.
        max_queued_requests=plan.max_queue + plan.most_replicas * plan.max_running,
        graceful_shutdown_timeout_s=plan.drain_seconds,
        **_number(plan),
    )
    door = serve.deployment(Door).options(
        logging_config=quiet,
        num_replicas=1,
        # Where the proxy is, and the folder of videos: a machine that is taken away is another.
        ray_actor_options={"num_cpus": 0, "resources": {HEAD: 0.001}, "runtime_env": OWN},
        max_ongoing_requests=MOST_AT_DOOR,
        graceful_shutdown_timeout_s=plan.drain_seconds + 10,
    )
    return door.bind(replicas.bind(given), given, settings)


def cards(plan: Plan) -> float:
    """GPUs of a replica."""
    return min(1, gpus()) if plan.gpus is None else plan.gpus


def _number(plan: Plan) -> dict[str, Any]:
    """How many replicas: fixed, or as many as there is work for."""
    if plan.most_replicas == plan.replicas:
        return {"num_replicas": plan.replicas}
    target = max(1, plan.max_running // 2)
    limits = {"min_replicas": plan.replicas, "max_replicas": plan.most_replicas}
    return {"autoscaling_config": {**limits, **PACE, "target_ongoing_requests": target}}
