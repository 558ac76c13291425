"""Before a machine is taken off a cluster that serves: `python -m vivace.serve.cluster.leave 600`, Kubernetes' preStop.

On the head's machine the door takes nothing more, and what it has is finished. Any other machine is given up: Ray
starts its replicas elsewhere where there is room, sends them nothing more, and ends the machine when they are done.
"""

from __future__ import annotations

import sys
import time
from typing import Any, cast

from vivace.cluster.connect import connect
from vivace.errors import InputError
from vivace.serve.cluster.run import drain

LOOK = 1.0  # seconds between two looks


def leave(seconds: float) -> None:
    """Have this machine's work finished, or what of it is within `seconds`. Raises InputError."""
    import ray
    from ray import serve

    from vivace.serve.cluster.app import HEAD, NAME

    with connect("auto"):
        mine = ray.get_runtime_context().get_node_id()
        here = next(node for node in ray.nodes() if node["NodeID"] == mine)
        if HEAD not in here["Resources"]:
            give_up(mine, seconds=seconds)
        elif NAME in serve.status().applications:
            drain(serve.get_app_handle(NAME), seconds=seconds)


def give_up(node: str, *, seconds: float) -> None:
    """Have Ray drain a machine and wait until it has left. Raises InputError where Ray refuses."""
    import ray
    from ray import _raylet  # what `ray drain-node` calls; nothing public does it
    from ray.core.generated import autoscaler_pb2

    reason = cast("Any", autoscaler_pb2).DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    end = time.time() + seconds
    client = cast("Any", _raylet).GcsClient(address=ray.get_runtime_context().gcs_address)
    taken, why = client.drain_node(node, reason, "it is being taken away", int(end * 1000))
    if not taken:
        raise InputError(f"Ray does not let the machine go: {why}")
    while time.time() < end and any(one["Alive"] and one["NodeID"] == node for one in ray.nodes()):
        time.sleep(LOOK)


if __name__ == "__main__":
    leave(float(sys.argv[1]))
