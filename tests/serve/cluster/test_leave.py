"""A machine that is to be taken away: Ray lets it go, and nothing is sent there any more."""

import pytest

from vivace.serve.cluster.leave import give_up

pytestmark = pytest.mark.timeout(600)  # clusters start slowly on a busy machine


def test_a_machine_that_is_given_up_leaves_the_cluster(machine):
    import ray

    give_up(machine.id, seconds=120.0)
    assert [node["Alive"] for node in ray.nodes() if node["NodeID"] == machine.id] == [False]
    assert ray.cluster_resources()["CPU"] == 2.0
