"""What has room where: a worker is on one machine."""

import pytest

from vivace.cluster.places import grows, machines, places, share

UNEQUAL = ({"CPU": 8.0}, {"CPU": 2.0}, {"memory": 1.0})


@pytest.mark.parametrize(
    ("cpus", "gpus", "room"), [(1, 0, 10), (4, 0, 2), (5, 0, 1), (9, 0, 0), (0.1, 0, 100), (0, 1, 0), (1, 1, 0)]
)
def test_a_worker_has_room_on_one_machine(cpus, gpus, room):
    assert places(UNEQUAL, cpus=cpus, gpus=gpus) == room


def test_both_needs_are_on_the_same_machine():
    assert places(({"CPU": 4.0, "GPU": 8.0}, {"CPU": 64.0}), cpus=2, gpus=1) == 2


# Ten processors for two workers are five each only where they are on one machine.
@pytest.mark.parametrize(("workers", "each"), [(1, 8), (2, 4), (3, 2), (5, 2), (6, 1), (10, 1), (11, 0)])
def test_unequal_machines_are_shared_so_that_all_have_room(workers, each):
    assert share(UNEQUAL, workers=workers) == each
    assert each == 0 or places(UNEQUAL, cpus=each) >= workers


def test_a_cluster_of_ones_own_has_its_machine_and_never_more(cluster):
    assert [one["CPU"] for one in machines()] == [2.0]
    assert not grows()
