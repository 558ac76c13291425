"""A Ray cluster: one of this process's own, closed to everything else, or one that is there already."""

from __future__ import annotations

import ipaddress
import logging
import os
import secrets
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from vivace.errors import InputError, first_line, install

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
MANY_MACHINES = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
TOKEN = Path.home() / ".ray" / "auth_token"
ANSWER = 30.0  # seconds that a cluster has for a question of ours


@contextmanager
def connect(
    address: str | None = None,
    *,
    cpus: int | None = None,
    store_bytes: int | None = None,
    dashboard: bool = False,
    logs: bool = False,
) -> Iterator[str | None]:
    """Be connected to a cluster inside the block. Raises InputError where Ray is missing or does not answer.

    Without an address a cluster of this process's own is started and ends with it: everything of it listens on the
    loopback device alone, and answers only who has its token. `cpus` and `store_bytes` are what it may use; `dashboard`
    shows it in a browser on this machine, at the address that the block is given, to who has that token. An address, or
    "auto", joins a cluster that somebody runs; a warning says where that is open to its network. With `logs`, what the
    cluster's processes say comes out here too.
    """
    prepare(own=address is None)
    try:
        import ray
    except ImportError as error:
        raise InputError(f"Ray is not installed; install it with: {install('ray')}") from error
    options: dict[str, Any] = {"address": address}
    if address is not None:
        reach(address)
    else:
        options = {
            "address": "local",
            "num_cpus": cpus,
            "object_store_memory": store_bytes,
            "include_dashboard": dashboard,
            "dashboard_host": LOOPBACK,
        }
    try:
        joined = ray.init(**options, configure_logging=False, log_to_driver=logs)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = "a cluster on this machine cannot be started" if address is None else f"no Ray cluster at {address}"
        raise InputError(f"{where}: {first_line(error)}") from error
    try:
        if address is not None and open_to_network():
            logger.warning(
                "this Ray cluster asks for no token: whoever reaches %s runs code on it; start it again, on every "
                "machine after: export RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=%s",
                ray.util.get_node_ip_address(),
                "~/.ray/auth_token",
            )
        yield f"http://{joined.dashboard_url}" if joined.dashboard_url else None
    finally:
        ray.shutdown()


def reach(address: str) -> None:
    """Raise InputError where nobody listens at HOST:PORT: Ray would go on asking for a quarter of an hour."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return  # "auto": Ray knows where
    try:
        if int(port) > 65535:  # some resolvers take the rest of it
            raise OverflowError("a port is at most 65535")
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"no Ray cluster at {address}: {first_line(error)}; give the address that `ray start --head` said, or auto"
        ) from error


def open_to_network() -> bool:
    """Whether the connected cluster can be reached from other machines and answers who has no token.

    It is asked without one, whatever this process has: a cluster that wants none takes any.
    """
    import grpc
    import ray
    from ray.core.generated import gcs_service_pb2 as gcs
    from ray.core.generated import gcs_service_pb2_grpc

    where = getattr(ray.get_runtime_context(), "gcs_address", None)  # Ray's client, for ray://, knows none
    if where is None or ipaddress.ip_address(ray.util.get_node_ip_address()).is_loopback:
        return False
    with grpc.insecure_channel(where, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            asked = cast("Any", gcs).CheckAliveRequest()
            gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel).CheckAlive(asked, timeout=ANSWER)
        except grpc.RpcError:
            return False
    return True


def gpus() -> int:
    """GPUs of the cluster that this process is connected to."""
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def token() -> dict[str, str]:
    """What Ray's dashboard asks a browser for: the token, where this process drew it, else where it is kept."""
    if (path := os.environ.get("RAY_AUTH_TOKEN_PATH")) or "RAY_AUTH_TOKEN" not in os.environ:
        return {"token_in": path or str(TOKEN)}
    return {"token": os.environ["RAY_AUTH_TOKEN"]}


def prepare(*, own: bool) -> None:
    """Set what Ray reads from the environment once, when it is imported; what is set stays. Raises InputError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Who asks for no GPU sees none.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
    if not own:
        return
    if sys.modules.get("ray") and os.environ.get(MANY_MACHINES) != "0":
        raise InputError(
            "Ray was imported before a cluster of one's own was asked for, which it has to know by then; "
            "import it later, or give the address of a cluster"
        )
    # Serve's controller asks itself ten times a second what there is to do, which on two cores is felt.
    os.environ.setdefault("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "0.5")
    # Off, a cluster is one machine's, and listens on the loopback device; the name says where that is usual.
    os.environ[MANY_MACHINES] = "0"
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    known = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ or TOKEN.is_file()
    if os.environ["RAY_AUTH_MODE"] == "token" and not known:
        # For this process and what it starts; Ray would write one into the home folder.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
