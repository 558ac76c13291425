"""Video jobs on disk: a state file and a video a job, written whole or not at all, so that a crash loses no truth."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vivace.errors import InputError

logger = logging.getLogger(__name__)

LOST = {"code": "server_restarted", "message": "the server ended while it worked on this; ask again"}


@contextlib.contextmanager
def held(folder: Path | None) -> Iterator[None]:
    """Keep a folder of videos for this process alone: another server would take what this one works on for lost.

    Raises InputError for one that another server keeps.
    """
    if folder is None:
        yield
        return
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise InputError(f"{folder} cannot be a folder of videos ({error.strerror}); name another") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another server keeps its videos in {folder}; name another --folder") from None
        except OSError as error:  # there are file systems without locks
            logger.warning("%s cannot be locked (%s): give it to one server alone", folder, error.strerror)
        yield


@contextlib.contextmanager
def _told(name: str) -> Iterator[None]:
    """Log what the disk does not let go of: one file must not keep all others."""
    try:
        yield
    except OSError as error:
        logger.warning("%s cannot be deleted: %s", name, error.strerror or type(error).__name__)


class Shelf:
    """Keeps the records of video jobs, as the API shows them, and their files, for `seconds` and within `most_bytes`.

    What a former process left unfinished is marked as failed. Without a folder everything goes with the process.
    Raises InputError for a folder that cannot be one.
    """

    def __init__(self, folder: Path | None, *, seconds: float, most_bytes: int) -> None:
        self._own = folder is None
        self.folder = Path(tempfile.mkdtemp(prefix="vivace-")) if folder is None else folder
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise InputError(f"{self.folder} cannot be a folder of videos ({error.strerror}); name another") from error
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise InputError(f"nothing can be written to {self.folder}; name another folder of videos")
        self._seconds, self._most = seconds, most_bytes
        self._records: dict[str, dict[str, Any]] = {}
        self._lock = threading.RLock()  # held for moments: the event loop waits for it
        self._sweeping = threading.Lock()
        self._recover()

    def put(self, record: dict[str, Any]) -> None:
        """Remember a job as it is now, on disk first. Raises OSError, and then nothing has changed."""
        text = json.dumps(record, sort_keys=True)
        with self._lock:
            with self.whole(self._state(record["id"])) as part:
                part.write_text(text, "utf-8")
            self._records[record["id"]] = record

    def note(self, record: dict[str, Any]) -> None:
        """Remember it in memory alone: progress, and truths that the disk has no room for."""
        with self._lock:
            self._records[record["id"]] = record

    def get(self, name: str) -> dict[str, Any] | None:
        with self._lock:
            return self._records.get(name)

    def all(self) -> list[dict[str, Any]]:
        """Every record, the newest first."""
        with self._lock:
            return sorted(self._records.values(), key=lambda one: (one["created_at"], one["id"]), reverse=True)

    def video(self, name: str) -> Path:
        """Where a job's video is, or would be."""
        return self.folder / f"{name}.mp4"

    def delete(self, name: str) -> bool:
        """Forget a job and its file; False where there was none. Raises OSError, and then it is still known."""
        with self._lock:
            if name not in self._records:
                return False
            self.video(name).unlink(missing_ok=True)
            self._state(name).unlink(missing_ok=True)
            del self._records[name]
            return True

    def sweep(self) -> None:
        """Delete what is over its time and what has no record, then the oldest finished ones until the quota holds.

        What the disk does not let go of stays, and is tried again the next time. It asks the disk for every file: not
        for an event loop, and only once at a time.
        """
        if not self._sweeping.acquire(blocking=False):
            return
        try:
            self._sweep(time.time())
        finally:
            self._sweeping.release()

    def _sweep(self, now: float) -> None:
        for record in self.all():
            if record.get("expires_at") and record["expires_at"] <= now:
                self._drop(record["id"])
        # The file may have come after its record was deleted.
        for path in self.folder.glob("video_*.mp4"):
            if path.stem not in self._records and not self._state(path.stem).exists():
                with _told(path.stem):
                    path.unlink(missing_ok=True)
        over = self.nbytes - self._most
        for record in reversed(self.all()):
            if over > 0 and record["status"] in ("completed", "failed"):
                over -= self._drop(record["id"])

    def _drop(self, name: str) -> int:
        """Forget a job and its file; the bytes that this freed."""
        nbytes = self._nbytes(name)
        with _told(name):
            self.delete(name)
            return nbytes
        return 0

    @property
    def nbytes(self) -> int:
        """Of the records and videos in the folder."""
        with self._lock:
            names = list(self._records)
        return sum(map(self._nbytes, names))

    def _nbytes(self, name: str) -> int:
        sizes = 0
        for file in (self._state(name), self.video(name)):
            with contextlib.suppress(FileNotFoundError):
                sizes += file.stat().st_size
        return sizes

    @property
    def expiry(self) -> int:
        """When something that is finished now will be deleted, as a Unix time."""
        return int(time.time() + self._seconds)

    def close(self) -> None:
        if self._own:
            shutil.rmtree(self.folder, ignore_errors=True)

    @contextlib.contextmanager
    def whole(self, path: Path) -> Iterator[Path]:
        """A temporary name beside `path`, which takes its place when the block ends. Raises OSError."""
        part = path.with_name(f".{path.stem}.part{path.suffix}")
        if self._own:
            # Systems clear temporary folders of what was not used for some days.
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            yield part
            with part.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

    def _state(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _recover(self) -> None:
        for part in self.folder.glob(".*.part.*"):
            with _told(part.name):
                part.unlink(missing_ok=True)
        for path in self.folder.glob("video_*.json"):
            try:
                record = json.loads(path.read_text("utf-8"))
                known = record["id"] == path.stem and {"status", "created_at"} <= record.keys()
            except (OSError, ValueError, KeyError, TypeError):
                known = False
            if not known:
                logger.warning("%s is no record of a video job; left alone", path.name)
                continue
            lost = record["status"] in ("queued", "in_progress")
            gone = record["status"] == "completed" and not self.video(record["id"]).is_file()
            self._records[record["id"]] = record
            if lost or gone:
                record = record | {"status": "failed", "error": LOST, "expires_at": self.expiry}
                with contextlib.suppress(OSError):
                    self.put(record)
                self.note(record)
        self.sweep()
