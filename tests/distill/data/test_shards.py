"""Shard patterns, shards by URL, and files that are no shards."""

import http.server
import io
import tarfile
import threading
from functools import partial
from typing import ClassVar

import pytest

from vivace.distill.data import shards
from vivace.distill.data.sample import Refused
from vivace.distill.data.shards import Shards, expand
from vivace.errors import InputError


def write(path, names):
    with tarfile.open(path, "w") as tar:
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.size = 3
            tar.addfile(entry, io.BytesIO(b"abc"))
    return path


@pytest.fixture
def server(tmp_path):
    """A folder served over HTTP: the folder and its address."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{found.server_port}"
        found.shutdown()


def test_ranges():
    assert expand("https://x/{008..011}.tar") == [f"https://x/{n}.tar" for n in ("008", "009", "010", "011")]
    assert len(expand("https://x/{0..1}/{00..09}.tar")) == 20
    with pytest.raises(InputError, match=r"\{9\.\.3\} in data\.path is empty"):
        expand("a-{9..3}.tar")


def test_a_folder_of_shards(tmp_path):
    for name in ("b.tar", "a.tar", "c.txt"):
        write(tmp_path / name, ["x.txt"])
    assert expand(str(tmp_path)) == [str(tmp_path / "a.tar"), str(tmp_path / "b.tar")]
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match=r"holds no \.tar files"):
        expand(str(tmp_path / "none"))


def test_members_are_grouped_up_to_the_first_dot(tmp_path):
    path = write(tmp_path / "a.tar", ["d/x.jpg", "d/x.seg.png", "y.JPG", "no_extension"])
    source = Shards(str(path), cache=tmp_path)
    assert [place.name for place in source.places(str(path))] == ["d/x", "y"]
    first, second = source.places(str(path))
    assert source.read(first) == {"jpg": b"abc", "seg.png": b"abc"}
    assert source.read(second) == {"jpg": b"abc"}


def test_shards_by_url_are_fetched_once(server, tmp_path):
    folder, address = server
    write(folder / "0.tar", ["x.txt"])
    source = Shards(f"{address}/{{0..1}}.tar", cache=tmp_path / "cache")
    (place,) = source.places(f"{address}/0.tar")
    (folder / "0.tar").unlink()
    assert source.read(place) == {"txt": b"abc"}
    with pytest.raises(InputError, match="cannot be fetched"):
        source.places(f"{address}/1.tar")
    assert len(list((tmp_path / "cache").iterdir())) == 1


class Faulty(http.server.BaseHTTPRequestHandler):
    """Sends what `faults` says, one a request, and then the whole file."""

    body = b""
    faults: ClassVar[list[str]] = []

    def do_GET(self):
        fault = self.faults.pop(0) if self.faults else "none"
        if fault == "busy":
            self.send_error(503)
            return
        self.send_response(200)
        if fault == "chunks":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n" % len(self.body) + self.body[:100])
            return
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body[:1000] if fault == "cut" else self.body)

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("fault", ["cut", "busy", "chunks"])
def test_a_download_that_fails_is_tried_again_and_never_kept_in_part(tmp_path, monkeypatch, caplog, fault):
    monkeypatch.setattr(shards, "WAITS", (0.01, 0.01))
    raw = write(tmp_path / "0.tar", ["x.txt", "y.txt"]).read_bytes()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Faulty) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{found.server_port}/0.tar"
        monkeypatch.setattr(Faulty, "body", raw)
        monkeypatch.setattr(Faulty, "faults", [fault] * 3)
        source = Shards(address, cache=tmp_path / "cache")
        with pytest.raises(InputError, match=r"shard .*0\.tar cannot be fetched \(.+\); check data\.path"):
            source.places(address)
        assert list((tmp_path / "cache").iterdir()) == []
        Faulty.faults += [fault] * 2
        assert [place.name for place in source.places(address)] == ["x", "y"]
        assert source.problem(address) is None
        found.shutdown()
    (kept,) = (tmp_path / "cache").iterdir()
    assert kept.read_bytes() == raw
    assert "it is tried again in 0.01 seconds" in caplog.text


def test_missing_and_other_files(tmp_path):
    write(tmp_path / "0.tar", ["x.txt"])
    with pytest.raises(InputError, match=r"no shard .*1\.tar \(1 of 2 are missing\)"):
        Shards(str(tmp_path / "{0..1}.tar"), cache=tmp_path)
    (tmp_path / "text.tar").write_text("not a tar file")
    source = Shards(str(tmp_path), cache=tmp_path)
    assert [len(source.places(shard)) for shard in source.shards()] == [1, 0]
    assert list(map(source.problem, source.shards())) == [None, "a shard that is no uncompressed tar file"]


# Where a shard of three small files ends, in blocks: after y's header, in the middle of it, in y's text
@pytest.mark.parametrize(("blocks", "whole"), [(3, 1), (2.5, 1), (3.001, 1), (4, 2)])
def test_a_shard_that_is_cut_gives_what_it_has(tmp_path, blocks, whole):
    path = write(tmp_path / "a.tar", ["x.txt", "y.txt", "z.txt"])
    path.write_bytes(path.read_bytes()[: int(blocks * 512)])
    source = Shards(str(path), cache=tmp_path)
    places = source.places(str(path))
    assert [source.read(place) for place in places[:whole]] == [{"txt": b"abc"}] * whole
    for place in places[whole:]:
        with pytest.raises(Refused, match="a file that is cut short"):
            source.read(place)
    # A cut between two files is no other than an end.
    assert source.problem(str(path)) == (None if blocks == 4 else "a shard that is cut short")


@pytest.mark.parametrize("size", [-512, -1, 8 << 40])
def test_a_size_that_cannot_be_is_not_believed(tmp_path, size):
    path = write(tmp_path / "a.tar", ["x.txt"])
    header = bytearray(tarfile.TarInfo("y.txt").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (
        b"\xff" + size.to_bytes(11, "big", signed=True) if size < 0 else b"\x80" + size.to_bytes(11, "big")
    )
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(path.read_bytes()[:1024] + header + b"abc".ljust(512, b"\0"))
    source = Shards(str(path), cache=tmp_path)
    first, *rest = source.places(str(path))
    assert source.problem(str(path)) == "a shard that is cut short"
    assert source.read(first) == {"txt": b"abc"}
    assert len(rest) == (size > 0)
    for place in rest:
        with pytest.raises(Refused, match="a file that is cut short"):
            source.read(place)


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").touch()
    source = Shards("http://127.0.0.1:1/0.tar", cache=tmp_path / "file")
    with pytest.raises(InputError, match=r"file cannot be made a folder for shards \(File exists\); set data\.cache"):
        source.places("http://127.0.0.1:1/0.tar")


def test_a_header_that_is_broken_is_not_taken_for_the_end(tmp_path):
    path = write(tmp_path / "a.tar", ["x.txt", "y.txt", "z.txt"])
    raw = bytearray(path.read_bytes())
    raw[1024:1536] = b"?" * 512
    path.write_bytes(raw)
    source = Shards(str(path), cache=tmp_path)
    assert [place.name for place in source.places(str(path))] == ["x"]
    assert source.problem(str(path)) == "a shard that is cut short"
