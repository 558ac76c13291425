"""What is made of a load on Ray: the ratios, the table, and every answer counted as what it was."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from PIL import Image

from vivace.bench.cluster import ONE, PLAIN, SERVERS, TWO, Load, Refused, apart, asker, options, write
from vivace.serve.request import Request


def one_round(server, number, seconds, **more):
    line = {"server": server, "round": number, "concurrency": 2, "seconds": seconds, "latencies": [1.0, 2.0]}
    return line | {"failed": 0, "cold_s": 9.0, "memory_gib": 1.5, "from_plain": 0.0} | more


def test_what_ray_costs_is_told_with_how_sure_that_is(tmp_path):
    path = tmp_path / "a.json"
    first = [one_round(PLAIN, 0, 2.0), one_round(ONE, 0, 2.1, failed=1), one_round(TWO, 0, 1.4, from_plain=None)]
    write(path, {"command": "x"}, first)
    found = json.loads(path.read_text())
    assert found["ratios"] == {
        "overhead": 0.05, "overhead_error": None, "two_over_one": 1.5, "two_over_one_error": None
    }  # fmt: skip
    assert "Overhead of Ray 5.0%; two replicas 1.500 times one." in path.with_suffix(".md").read_text()
    # The machine is half as quick now, for all of them.
    second = [one_round(TWO, 1, 2.8, memory_gib=2.0), one_round(PLAIN, 1, 4.0), one_round(ONE, 1, 4.4, from_plain=0.5)]
    write(path, {"command": "x"}, [*first, *second], {"hung": 0, "sent_again": 3})
    found = json.loads(path.read_text())
    assert found["rounds"] == [*first, *second]
    assert found["ratios"]["overhead"] == pytest.approx(6.5 / 6 - 1, abs=1e-3)
    assert found["ratios"]["overhead_error"] == pytest.approx(0.025, abs=1e-3)
    lines = {line["server"]: line for line in found["results"]}
    assert list(lines) == list(SERVERS)
    assert (lines[ONE]["failed"], lines[ONE]["from_plain"]) == (1, 0.5)
    assert (lines[TWO]["memory_gib"], lines[TWO]["from_plain"], lines[TWO]["pictures"]) == (2.0, 0.0, 4)
    text = path.with_suffix(".md").read_text()
    assert "4 pictures of each server, in 2 rounds. Overhead of Ray 8.3% ± 2.5%" in text
    assert "hung 0, sent again 3" in text


def test_replicas_share_the_machine_and_each_round_asks_for_new_pictures():
    load = Load(model="builtin", size=None, steps=(1, 3), pictures=24, rounds=3, concurrency=2)
    assert "--ray" not in options(PLAIN, load)
    one, two = (options(name, load) for name in (ONE, TWO))
    assert float(one[one.index("--cpus") + 1]) >= float(two[two.index("--cpus") + 1]) >= 1
    assert two[two.index("--replicas") + 1] == "2"
    seeds = [request.seed for number in range(3) for request in load.requests(number)]
    assert len(seeds) == len(set(seeds)) == 24


def test_a_load_says_how_many_pictures_it_comes_to():
    """Three of every client in a round at least, which may be more than were asked for."""
    load = Load(model="builtin", size=None, steps=(1, 3), pictures=24, rounds=6, concurrency=4)
    told = load.facts()
    assert (told["pictures"], told["pictures_a_round"], told["pictures_a_server"]) == (24, 12, 72)


def test_a_request_that_failed_is_in_no_comparison():
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    assert apart({1: red, 3: red}, {1: red, 2: blue}) == 0.0
    assert apart({1: red}, {1: blue}) == 170.0
    assert apart({}, {1: red}) is None


@pytest.mark.parametrize(
    ("status", "headers", "said"),
    [(503, {"Retry-After": "5"}, "503 with Retry-After"), (503, {}, "503"), (500, {}, "500")],
)
def test_an_answer_that_is_no_picture_is_told_apart(status, headers, said):
    class Refuses(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(json.dumps({}).encode())

        def log_message(self, format, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(Refused) as error:
            asker(f"http://127.0.0.1:{server.server_port}")(Request(prompt="a", size=(64, 64), steps=1, seed=1))
        server.shutdown()
    assert error.value.what == said


def test_nobody_there_is_no_answer():
    with pytest.raises(Refused, match="no answer"):
        asker("http://127.0.0.1:9")(Request(prompt="a", size=(64, 64), steps=1, seed=1))
