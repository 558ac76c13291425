"""What is made of a load on Ray: the ratios, the table, and every answer counted as what it was."""

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from PIL import Image

from vivace.bench.cluster import ONE, PLAIN, TWO, Refused, apart, asker, memory, ratios, table, write
from vivace.serve.request import Request

LINES = [
    {"server": name, "images_per_second": rate, "p50_s": 1.0, "p95_s": 2.0, "failed": 0, "from_plain": 0.0}
    | {"rounds": [rate], "cold_s": 9.0, "memory_gib": 1.5}
    for name, rate in ((PLAIN, 1.05), (ONE, 1.0), (TWO, 1.5))
]


def test_overhead_is_of_the_plain_servers_time_and_two_are_over_one():
    assert ratios(LINES) == {"overhead": 0.05, "two_over_one": 1.5}
    text = table(LINES, {"hung": 0, "sent_again": 3})
    assert "Overhead of Ray 5.0%; two replicas 1.50 times one." in text
    assert "hung 0, sent again 3" in text


def turn(server, rate, *, number, **more):
    line = {"server": server, "images_per_second": rate, "p50_s": 1.0, "p95_s": 2.0, "failed": 0, "from_plain": 0.0}
    return line | {"cold_s": 5.0, "memory_gib": 1.0, "round": number, **more}


def test_each_turn_is_kept_and_a_servers_line_is_its_median(tmp_path):
    turns = [turn(PLAIN, 3.0, number=1, cold_s=9.0), turn(ONE, 2.0, number=1, failed=1, from_plain=None)]
    write(tmp_path / "a.json", {"command": "x"}, turns)
    assert not (tmp_path / "a.md").exists()
    assert len(json.loads((tmp_path / "a.json").read_text())["turns"]) == 2
    turns += [turn(TWO, 4.0, number=1), turn(PLAIN, 1.0, number=2, memory_gib=2.0), turn(PLAIN, 2.0, number=3)]
    write(tmp_path / "a.json", {"command": "x"}, turns)
    found = {line["server"]: line for line in json.loads((tmp_path / "a.json").read_text())["results"]}
    assert found[PLAIN]["images_per_second"] == 2.0
    assert found[PLAIN]["rounds"] == [3.0, 1.0, 2.0]
    assert (found[PLAIN]["cold_s"], found[PLAIN]["memory_gib"]) == (5.0, 2.0)
    assert (found[ONE]["failed"], found[ONE]["from_plain"]) == (1, None)
    assert "| 3.00 1.00 2.00 |" in (tmp_path / "a.md").read_text()


def test_a_request_that_failed_is_in_no_comparison():
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    assert apart({1: red, 3: red}, {1: red, 2: blue}) == 0.0
    assert apart({1: red}, {1: blue}) == 170.0
    assert apart({}, {1: red}) is None


def test_the_memory_is_of_all_that_a_server_started():
    code = "import sys; held = bytearray(b'x' * 2**28); print('there', flush=True); sys.stdin.read()"
    before = memory()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        assert process.stdout.readline() == b"there\n"
        assert 0.2 < memory() - before < 0.5
        process.stdin.close()


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
