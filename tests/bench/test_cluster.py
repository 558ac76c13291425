"""What is made of a load on Ray: the ratios, the table, and every answer counted as what it was."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from vivace.bench.cluster import ONE, PLAIN, TWO, Refused, asker, ratios, table
from vivace.serve.request import Request

LINES = [
    {"server": name, "images_per_second": rate, "p50_s": 1.0, "p95_s": 2.0, "failed": 0, "from_plain": 0.0}
    for name, rate in ((PLAIN, 1.05), (ONE, 1.0), (TWO, 1.5))
]


def test_overhead_is_of_the_plain_servers_time_and_two_are_over_one():
    assert ratios(LINES) == {"overhead": 0.05, "two_over_one": 1.5}
    text = table(LINES, {"hung": 0, "sent_again": 3})
    assert "Overhead of Ray 5.0%; two replicas 1.50 times one." in text
    assert "hung 0, sent again 3" in text


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
