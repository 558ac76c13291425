"""A real cluster on this machine: two CPU replicas of tiny models behind the door."""

from __future__ import annotations

import importlib.util
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from vivace.cluster.connect import connect, prepare
from vivace.families import FAMILIES
from vivace.serve.cluster.run import serving
from vivace.serve.plan import Plan

collect_ignore_glob = [] if importlib.util.find_spec("ray") else ["test_*.py"]
if importlib.util.find_spec("ray"):
    prepare(own=True)  # Ray has to be told first what it is for
    from vivace.serve.cluster import app

KEY = "a-key-of-the-tests-alone"
PATIENCE = 120  # seconds: no test waits for less than a slow machine may need


@dataclass(kw_only=True)
class Live:
    """A door that answers, and how to reach it and what is behind it."""

    url: str
    door: Any
    folders: dict[str, Path]

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=PATIENCE)

    @property
    def http(self) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=PATIENCE)

    def facts(self) -> dict[str, Any]:
        return self.door.facts.remote().result(timeout_s=PATIENCE)

    def outcomes(self, outcome: str) -> int:
        """How many requests ended like that in the replicas."""
        from ray import serve

        asked = serve.get_deployment_handle("Replica", "vivace").broadcast("ended")
        return sum(one.get(outcome, 0) for one in asked.results(timeout_s=PATIENCE))

    def idle(self) -> bool:
        return not self.facts()["unfinished"]


def wait(holds: Callable[[], object]) -> None:
    """Until it holds."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(scope="session")
def until() -> Callable[[Callable[[], object]], None]:
    return wait


@contextmanager
def started(tmp_path_factory: pytest.TempPathFactory, **fields: Any) -> Iterator[Live]:
    """Two tiny models on a cluster of their own, behind a door that is ready; `fields` are the plan's."""
    folders = {}
    for alias, family in (("tiny", "sd3"), ("clip", "wan")):
        folders[alias] = tmp_path_factory.mktemp(alias)
        FAMILIES[family].tiny().save_pretrained(folders[alias])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    plan = Plan(
        models={alias: str(folder) for alias, folder in folders.items()},
        **{"max_running": 2, "max_queue": 4, "gpus": 0, "drain_seconds": 5},
        folder=str(tmp_path_factory.mktemp("videos")),
        **fields,
    )
    with connect(cpus=2, store_bytes=100 * 2**20), serving(plan, api_key=KEY, port=port) as door:
        found = Live(url=f"http://127.0.0.1:{port}", door=door, folders=folders)
        wait(lambda: found.http.get("/readyz").status_code == 200)
        yield found


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    ui = importlib.util.find_spec("gradio") is not None
    with started(tmp_path_factory, replicas=2, ui=ui) as found:
        yield found


@pytest.fixture(scope="module")
def growing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """One replica that may become two, and pictures that may take no time to speak of."""
    settings = Plan.settings
    with pytest.MonkeyPatch.context() as patch:
        soon = {"upscale_delay_s": 0.0, "downscale_delay_s": 1.0, "metrics_interval_s": 0.5, "look_back_period_s": 1.0}
        patch.setattr(app, "PACE", soon)
        patch.setattr(Plan, "settings", lambda plan, **given: replace(settings(plan, **given), run_seconds=0.2))
        with started(tmp_path_factory, replicas=1, max_replicas=2) as found:
            yield found
