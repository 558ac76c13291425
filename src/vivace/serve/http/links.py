"""Pictures behind an address: kept in memory for a while, under a name and a signature that nobody can guess."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from urllib.parse import parse_qs

from vivace.serve.http.kept import Kept

PATH = "/v1/files/"


class Links:
    """Signed addresses of pictures; the oldest go when there are too many bytes."""

    def __init__(self, *, seconds: float, most_bytes: int) -> None:
        self._seconds = seconds
        self._secret = secrets.token_bytes(32)
        self.kept = Kept[tuple[bytes, str]](seconds=seconds, most_bytes=most_bytes)  # content, type

    def add(self, content: bytes, *, media_type: str) -> str:
        """Keep a picture; its path and query on this server."""
        name, expires = self.kept.add((content, media_type), nbytes=len(content)), int(time.time() + self._seconds)
        return f"{PATH}{name}?expires={expires}&signature={self._sign(name, expires)}"

    def get(self, name: str) -> tuple[bytes, str] | None:
        """A picture and its media type, while it is kept."""
        return self.kept.get(name)

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
