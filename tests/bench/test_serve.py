"""The load on three servers: the same requests for each, and every figure beside its quality."""

import json

import pytest

from vivace.cli import main
from vivace.serve.load import put, requests


def test_requests_are_mixed_and_the_same_for_everyone():
    one, two = (requests(20, prompt="a", size=(64, 64), steps=(3, 6), seed=0) for _ in range(2))
    assert one == two
    assert {request.steps for request in one} == {3, 4, 5, 6}
    assert len({request.seed for request in one}) == 20


def test_a_closed_loop_has_as_many_at_a_time_as_it_has_clients():
    import threading
    import time

    now, most, lock = 0, 0, threading.Lock()

    def ask(request):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.02)
        with lock:
            now -= 1
        if request.seed == 3:
            raise RuntimeError("one fails")

    found = put(ask, requests(12, prompt="a", size=(64, 64), steps=(1, 1), seed=0), concurrency=3, server="x")
    assert most == 3
    assert (found.pictures, found.failed) == (11, 1)
    assert 0.02 <= found.p50_s <= found.p95_s < found.seconds


def test_three_servers_in_one_run(tmp_path, capsys):
    options = ["--tiny", "--steps", "4", "--pictures", "4", "--concurrency", "1,3", "-o", str(tmp_path)]
    with pytest.raises(SystemExit) as end:
        main(["bench", "--serve", "sd3", "--device", "cpu", *options])
    assert end.value.code == 0
    (path,) = tmp_path.glob("*-serve-sd3.json")
    found = json.loads(path.read_text())
    lines = found["results"]
    assert [(line["concurrency"], line["server"]) for line in lines] == [
        (count, name) for count in (1, 3) for name in ("stock, one lock", "exact, one lock", "exact, our engine")
    ]
    assert found["load"]["steps"] == [3, 5]
    assert all(line["pictures"] == 4 and line["failed"] == 0 for line in lines)
    assert all(line["from_stock"] < 2 and line["noise_floor"] < 2 for line in lines)
    assert lines[0]["from_stock"] == 0
    assert 0 < lines[-1]["device_busy"] <= 1
    assert lines[-1]["requests_per_call"] >= 1
    assert found["machine"]["processor"]
    assert capsys.readouterr().out.count("| 3 |") == 3


def test_it_goes_on_where_it_stopped_and_says_what_python_costs(tmp_path, capsys):
    def bench(*options):
        shape = ["--tiny", "--device", "cpu", "--steps", "2", "--pictures", "4", "-o", str(tmp_path)]
        with pytest.raises(SystemExit) as end:
            main(["bench", "--serve", "sd3", *shape, *options])
        assert end.value.code == 0
        (path,) = tmp_path.glob("*-serve-sd3.json")
        return json.loads(path.read_text())["results"], capsys.readouterr().out

    # Each run is over its budget after one turn.
    first, said = bench("--concurrency", "2", "--budget-s", "1e-6")
    assert [line["server"] for line in first] == ["stock, one lock"]
    assert "2 left for the next time" in said
    whole, said = bench("--concurrency", "2")
    assert whole[0] == first[0]
    assert [line["server"] for line in whole] == ["stock, one lock", "exact, one lock", "exact, our engine"]
    assert "left for the next time" not in said
    # Another number of clients is another turn of the same load; a profile is made where there is none yet.
    more, said = bench("--concurrency", "1,2", "--profile")
    assert [line["concurrency"] for line in more] == [1, 1, 1, 2, 2, 2]
    assert more[3:5] == whole[:2]
    for line in (more[2], more[5]):
        found = line["profile"]
        assert found["computing"] + found["python"] + found["joining"] + found["empty"] == pytest.approx(1, abs=0.01)
        assert 0 < found["computing"] <= 1
        assert found["device"] == 0  # there is no GPU to wait for
        assert found["cpu_s_per_image"]["worker"] > 0
        assert found["lock_wait_ms"] >= 0
    assert "idle for Python" in said
    # A different load is in a file of its own.
    with pytest.raises(SystemExit):
        main(["bench", "--serve", "sd3", "--tiny", "--device", "cpu", "--steps", "1", "--concurrency", "1",
              "--pictures", "4", "-o", str(tmp_path)])  # fmt: skip
    assert len(list(tmp_path.glob("*-serve-sd3*.json"))) == 2


def test_clients_are_numbers(capsys):
    with pytest.raises(SystemExit) as end:
        main(["bench", "--serve", "--concurrency", "many"])
    assert end.value.code == 2
    assert "like 1,4,16" in capsys.readouterr().err
