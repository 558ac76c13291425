"""Pictures behind an address: kept in memory for a while, under a name and a signature that nobody can guess."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
import time
from collections import OrderedDict
from urllib.parse import parse_qs

PATH = "/v1/files/"


class Links:
    """Signed addresses of pictures; the oldest go when there are too many bytes."""

    def __init__(self, *, seconds: float, most_bytes: int) -> None:
        self._seconds, self._most = seconds, most_bytes
        self._secret = secrets.token_bytes(32)
        self._kept: OrderedDict[str, tuple[float, bytes, str]] = OrderedDict()  # name -> expiry, content, type
        self._lock = threading.Lock()

    def add(self, content: bytes, *, media_type: str) -> str:
        """Keep a picture; its path and query on this server."""
        name, expires = secrets.token_urlsafe(18), int(time.time() + self._seconds)
        with self._lock:
            self._kept[name] = (expires, content, media_type)
            while len(self._kept) > 1 and (
                self._bytes() > self._most or next(iter(self._kept.values()))[0] < time.time()
            ):
                self._kept.popitem(last=False)
        return f"{PATH}{name}?expires={expires}&signature={self._sign(name, expires)}"

    def get(self, name: str) -> tuple[bytes, str] | None:
        """A picture and its media type, while it is kept."""
        with self._lock:
            expires, content, media_type = self._kept.get(name, (0, b"", ""))
        return (content, media_type) if expires >= time.time() else None

    def signed(self, path: str, query: str) -> bool:
        """Whether a path and query are one of these addresses, unexpired."""
        if not path.startswith(PATH):
            return False
        values = parse_qs(query)
        expires, signature = values.get("expires", [""])[0], values.get("signature", [""])[0]
        if not expires.isascii() or not expires.isdigit() or len(expires) > 12 or int(expires) < time.time():
            return False
        return hmac.compare_digest(self._sign(path.removeprefix(PATH), int(expires)).encode(), signature.encode())

    def _sign(self, name: str, expires: int) -> str:
        return hmac.new(self._secret, f"{name}:{expires}".encode(), hashlib.sha256).hexdigest()

    def _bytes(self) -> int:
        return sum(len(content) for _, content, _ in self._kept.values())
