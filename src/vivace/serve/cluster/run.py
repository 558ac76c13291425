"""Serving on Ray until a signal ends it: drain first, leave at once at the second signal."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, cast

from vivace.cluster.connect import connect, token
from vivace.cluster.places import Machines, grows, machines, places
from vivace.errors import InputError, first_line
from vivace.serve.http.log import configure
from vivace.serve.http.run import KEEP_SECONDS
from vivace.serve.plan import Plan

logger = logging.getLogger(__name__)

PASSING = 3.0
"""Seconds that an answer may take from the door to its client."""


def run(plan: Plan, *, api_key: str | None, port: int, address: str | None = None, dashboard: bool = False) -> int:
    """Serve a plan until a signal; the process's exit code. Raises InputError."""
    plan.settings(api_key=api_key)  # what is wrong comes out before Ray is started, which takes seconds
    configure()
    with connect(address, dashboard=dashboard, logs=True) as shown:
        # After Ray has set its own, and before anybody can be answered: from the first answer on the end is a drain.
        signalled = _signals()
        with serving(plan, api_key=api_key, port=port, own=address is None) as door:
            if dashboard and shown:
                logger.info("dashboard", extra={"facts": {"url": shown, **token()}})
            logger.info("listening", extra={"facts": {"host": plan.host, "port": port, "replicas": plan.replicas}})
            # In slices: a signal handler of Python's runs between two of them.
            while not signalled.wait(0.5):
                pass
            logger.info("draining")
            drain(door, seconds=plan.drain_seconds)
    return 0


@contextmanager
def serving(plan: Plan, *, api_key: str | None, port: int, own: bool = True) -> Iterator[Any]:
    """The plan's application, up and ready, on the connected cluster; the door's handle. Raises InputError.

    At the end the application is taken off the cluster; off one of our `own`, the whole of Ray Serve.
    """
    from ray import serve

    from vivace.serve.cluster.app import NAME, application, cards

    check_room(plan, machines(), cards=cards(plan), grows=not own and grows())
    made = application(plan, api_key=api_key, port=port)
    # Without a timeout of its own: the door has one for every request, and a video has none.
    http = {"host": plan.host, "port": port, "keep_alive_timeout_s": KEEP_SECONDS}
    serve.start(proxy_location="HeadOnly", http_options=http, logging_config={"log_level": "WARNING"})
    check_place(plan.host, port)
    try:
        try:
            yield serve.run(made, name=NAME, logging_config={"log_level": "WARNING"})
        except RuntimeError as error:
            raise InputError(f"the replicas do not start: {first_line(error)}; Ray's log says more") from error
    finally:
        serve.shutdown() if own else serve.delete(NAME)


def check_place(host: str, port: int) -> None:
    """Raise InputError where Ray Serve ran already and listens elsewhere: it keeps the place that it began with.

    A door made for the loopback device, which asks for no key, would otherwise stand open to the network.
    """
    from ray.serve.context import _get_global_client  # nothing public says where it listens

    found = cast("Any", _get_global_client()).http_config
    if (found.host, found.port) != (host, port):
        raise InputError(
            f"Ray Serve runs on this cluster already and listens on {found.host}:{found.port}, not on {host}:{port}; "
            f"give --host {found.host} --port {found.port}, or end it first with `serve shutdown`"
        )


def check_room(plan: Plan, found: Machines, *, cards: float, grows: bool) -> None:
    """Raise InputError for more replicas than the machines hold, unless the cluster grows: Ray would wait for ever."""
    room = places(found, cpus=plan.cpus, gpus=cards)
    if plan.most_replicas <= room:
        return
    if grows:
        logger.warning("room for %d of %d replicas; the cluster has to grow first", room, plan.most_replicas)
        return
    each = f"{plan.cpus:g} processors" + (f" and {cards:g} GPUs" if cards else "")
    raise InputError(
        f"{plan.most_replicas} replicas of {each} are asked for, and the cluster has room for {room}; set --replicas, "
        "--cpus or --gpus lower"
    )


def _signals() -> threading.Event:
    """Set by SIGTERM or SIGINT; from then on the next one ends the process without further ado."""
    came = threading.Event()

    def note(sig: int, frame: FrameType | None) -> None:
        if came.is_set():
            os._exit(128 + sig)
        came.set()

    for sig in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sig, note)
    return came


def drain(door: Any, *, seconds: float) -> None:
    """Have what runs finish, as far as it does within `seconds`."""
    door.drain.remote().result()
    end = time.monotonic() + seconds
    while door.busy.remote().result() and time.monotonic() < end:
        time.sleep(0.2)
    # What the door has answered still goes through Ray's proxy.
    time.sleep(PASSING)
