"""What takes time on Ray: a limit that is over, replicas that come and go, a video while the server ends."""

import threading

import pytest

from vivace.serve.cluster.run import drain

pytestmark = pytest.mark.timeout(600)  # clusters start slowly on a busy machine

LONG = {"prompt": "a", "size": "128x128", "steps": 150, "frames": 129}  # longer than a replica takes to come
SHORT = {"prompt": "a", "size": "64x64", "steps": 100, "frames": 5}
HEAVY = {"prompt": "a", "size": "256x256", "steps": 150}


def test_a_picture_whose_time_is_over_is_refused_and_its_steps_end(growing, until):
    failed = growing.outcomes("failed")
    with growing.http as http:
        answer = http.post("/v1/images/generations", json=HEAVY)
    assert answer.status_code == 504, answer.text
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    until(growing.idle)
    until(lambda: growing.outcomes("failed") == failed + 1)
    assert growing.facts()["retried"] == 0


def test_replicas_come_with_the_work_and_go_with_it(growing, until):
    assert growing.facts()["replicas"] == 1
    with growing.http as http:
        names = [http.post("/v1/videos", json=LONG).json()["id"] for _ in range(4)]
        # One has two places: the others are taken by the replica that came.
        until(lambda: growing.facts()["running"] == 4)
        until(lambda: growing.facts()["replicas"] == 2)  # the door looks now and then
        assert len(growing.facts()["drawing"]) == 2
        for name in names:
            http.delete(f"/v1/videos/{name}")
        until(growing.idle)
    until(lambda: growing.facts()["replicas"] == 1)


def test_a_video_is_finished_while_the_server_ends(growing, until):
    """Last: the door takes nothing more."""
    with growing.http as http:
        name = http.post("/v1/videos", json=SHORT).json()["id"]
        until(lambda: growing.facts()["running"] == 1)
        draining = threading.Thread(target=drain, args=(growing.door,), kwargs={"seconds": 300.0})
        draining.start()
        until(lambda: http.get("/readyz").status_code == 503)
        refused = http.post("/v1/videos", json=SHORT)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        draining.join(300)
        assert not draining.is_alive()
        found = http.get(f"/v1/videos/{name}").json()
        assert found["status"] == "completed", found
        assert http.get(f"/v1/videos/{name}/content").content[4:8] == b"ftyp"
