"""What a cluster has room for, machine by machine: all that one worker needs has to be on the same one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

NEARLY = 1e-6  # Ray counts in ten-thousandths: 0.1 of a processor ten times is one

Machines = Sequence[Mapping[str, float]]
"""The resources of each machine, under Ray's names: CPU, GPU."""


def machines() -> Machines:
    """The living machines of the cluster that this process is connected to."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def places(found: Machines, *, cpus: float = 0.0, gpus: float = 0.0) -> int:
    """How many workers that each need so much have room side by side; at least one of the two is above 0."""
    needs = {name: need for name, need in (("CPU", cpus), ("GPU", gpus)) if need > 0}
    return sum(min(int(one.get(name, 0.0) / need + NEARLY) for name, need in needs.items()) for one in found)


def share(found: Machines, *, workers: int) -> int:
    """The most whole processors that each of so many workers can have; 0 where there is no room for all of them.

    Machines differ: of eight processors here and two there, two workers get four each, not five.
    """
    largest = max((int(one.get("CPU", 0.0)) for one in found), default=0)
    return next((cpus for cpus in range(largest, 0, -1) if places(found, cpus=cpus) >= workers), 0)


def grows() -> bool:
    """Whether the connected cluster may get more machines by itself than it has now.

    That is what Ray's autoscaler says of its configuration; a cluster without one has no more than its machines.
    """
    import ray
    from ray._private.state import state  # nothing public says it

    now, most = ray.cluster_resources(), state.get_max_resources_from_cluster_config() or {}
    return any(most.get(name, 0) > now.get(name, 0.0) for name in ("CPU", "GPU"))
