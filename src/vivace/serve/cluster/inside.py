"""The port that Ray opens in each process of a deployment, for calls between deployments: by itself on every network.

What comes in there is unpickled, and the cluster's token is all that stands before it.
"""

from __future__ import annotations

from typing import Any

from vivace.serve.http.settings import loopback


def stay_inside() -> None:
    """On a cluster of one's own have it listen on the loopback device, as all else of Ray's does there.

    To be called while the deployment's object is made, before Ray opens the port. The process is this replica's alone.
    Raises AttributeError where another Ray opens it in another way, so that no replica starts open.
    """
    import ray
    from ray.serve._private import replica  # nothing public says where

    here = ray.util.get_node_ip_address()
    if not loopback(here):
        return  # the machines have to reach each other, and Ray's other ports are open too
    inside, anywhere = f"[{here}]" if ":" in here else here, replica.add_port_to_grpc_server

    def add(server: Any, address: str) -> int:
        return anywhere(server, address.replace("[::]", inside))

    replica.add_port_to_grpc_server = add
