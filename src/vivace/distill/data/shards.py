"""Webdataset tar shards, local or by URL: samples are the members that share a name up to the first dot."""

from __future__ import annotations

import http.client
import logging
import os
import re
import shutil
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote

from vivace.distill.data.sample import Place, Refused
from vivace.errors import InputError, first_line

logger = logging.getLogger(__name__)

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
BLOCK = 1 << 20
WAITS = (1.0, 4.0, 15.0)  # seconds before a download is tried again: hours of training hang on it


class Shards:
    """Random access to the samples of tar shards. Only headers are read until a sample is asked for."""

    def __init__(self, pattern: str, *, cache: Path) -> None:
        self.cache = cache
        self.names = expand(pattern)
        local = [name for name in self.names if not _remote(name)]
        missing = [name for name in local if not Path(name).is_file()]
        if missing:
            raise InputError(
                f"no shard {missing[0]} ({len(missing)} of {len(self.names)} are missing); check data.path"
            )
        self._problems: dict[str, str] = {}
        # Weakly sized: an index is some hundred bytes a sample.
        self._index = lru_cache(maxsize=64)(self._read_index)

    def shards(self) -> list[str]:
        """The shards' names."""
        return self.names

    def places(self, shard: str) -> list[Place]:
        """The samples of a shard, in its order."""
        return [Place(shard, name) for name in self._index(shard)]

    def problem(self, shard: str) -> str | None:
        """What is wrong with a shard whose places were asked for, or None."""
        return self._problems.get(shard)

    def read(self, place: Place) -> Mapping[str, bytes]:
        """A sample's members by extension. Raises Refused."""
        members = self._index(place.shard).get(place.name, {})
        try:
            with self.path(place.shard).open("rb") as file:
                # What a header says is believed only as far as there is a file.
                end = os.fstat(file.fileno()).st_size
                if any(offset + length > end for offset, length in members.values()):
                    raise Refused("a file that is cut short", broken=True)
                found = {extension: _slice(file.fileno(), *span) for extension, span in members.items()}
        except OSError as error:
            raise Refused("a shard that cannot be read", broken=True) from error
        return found

    def path(self, shard: str) -> Path:
        """Where the shard is on this machine; one by URL is fetched first. Raises InputError."""
        if not _remote(shard):
            return Path(shard)
        target = self.cache / quote(shard, safe="")
        if not target.exists():
            try:
                self.cache.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(
                    f"{self.cache} cannot be made a folder for shards ({error.strerror}); set data.cache to another one"
                ) from error
            _fetch(shard, target)
        return target

    def _read_index(self, shard: str) -> dict[str, dict[str, tuple[int, int]]]:
        """Name -> extension -> offset and length, of the regular files in a shard."""
        found: dict[str, dict[str, tuple[int, int]]] = {}
        path = self.path(shard)
        try:
            # Uncompressed only: a sample is read from its place in the file.
            with tarfile.open(path, "r:") as tar:
                while (member := tar.next()) is not None:
                    if member.size < 0 or tar.offset <= member.offset:
                        raise tarfile.ReadError("a size below 0, which would lead back for ever")
                    folder, _, file = member.name.rpartition("/")
                    name, dot, extension = file.partition(".")
                    if member.isreg() and dot:
                        key = f"{folder}/{name}" if folder else name
                        found.setdefault(key, {})[extension.lower()] = (member.offset_data, member.size)
                whole = _ends(path, tar.offset)
        except tarfile.ReadError:
            whole = False
        if not whole:
            self._problems[shard] = "a shard that is cut short" if found else "a shard that is no uncompressed tar file"
        return found


def expand(pattern: str) -> list[str]:
    """`a-{000..127}.tar` as 128 names; a folder as its .tar files. Raises InputError."""
    match = RANGE.search(pattern)
    if match:
        first, last = match.groups()
        numbers = range(int(first), int(last) + 1)
        if not numbers:
            raise InputError(f"the range {match.group()} in data.path is empty; write it from low to high")
        names = (
            pattern[: match.start()] + str(number).zfill(len(first)) + pattern[match.end() :] for number in numbers
        )
        return [one for name in names for one in expand(name)]
    if _remote(pattern):
        return [pattern]
    path = Path(pattern).expanduser()
    if path.is_dir():
        found = sorted(str(one) for one in path.glob("*.tar"))
        if not found:
            raise InputError(f"{path} holds no .tar files; give webdataset shards, or data.kind: folder for pictures")
        return found
    return [str(path)]


def _fetch(url: str, target: Path) -> None:
    """Download to `target`, which is there when it is whole; what may pass is tried again. Raises InputError."""
    for wait in (*WAITS, None):
        handle, temporary = tempfile.mkstemp(dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as file, urllib.request.urlopen(url, timeout=60) as remote:
                shutil.copyfileobj(remote, file, BLOCK)
                if remote.length:  # of what was announced; reading ends in silence where a connection does
                    raise ConnectionError(f"the connection ended {remote.length} bytes too early")
            os.replace(temporary, target)
            return
        except (OSError, http.client.HTTPException) as error:
            Path(temporary).unlink(missing_ok=True)
            if wait is None or not _may_pass(error):
                raise InputError(
                    f"shard {url} cannot be fetched ({first_line(error)}); check data.path and the network"
                ) from error
            logger.warning("%s: %s; it is tried again in %g seconds", url, first_line(error), wait)
            time.sleep(wait)


def _may_pass(error: Exception) -> bool:
    """Whether a download that failed so may go well a moment later."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code >= 500 or error.code in (408, 429)
    return isinstance(error, urllib.error.URLError | ConnectionError | TimeoutError | http.client.HTTPException)


def _remote(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def _ends(path: Path, offset: int) -> bool:
    """Whether a tar file ends at `offset`: with nothing, or with zeros. tarfile takes a broken header for an end."""
    with path.open("rb") as file:
        file.seek(offset)
        return not file.read(tarfile.BLOCKSIZE).strip(b"\0")


def _slice(descriptor: int, offset: int, length: int) -> bytes:
    return os.pread(descriptor, length, offset)
