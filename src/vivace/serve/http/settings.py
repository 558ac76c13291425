"""What a server is started with: where it listens, who may ask, and how much of anything one request may want."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path

from vivace.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every limit is on by default."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    allowed_hosts: tuple[str, ...] = ()  # more names than `host` that a request may be addressed to
    a1111: bool = False  # the A1111 routes too
    ui: bool = False  # the web page too, at /ui
    folder: Path | None = None  # of video jobs; None: they end with the server

    most_pixels: int = 4096 * 4096  # width x height x n of one request
    most_video_pixels: int = 256 * 2**20  # width x height x frames of one request
    most_steps: int = 150
    most_pictures: int = 10
    most_frames: int = 257
    most_prompt: int = 8000  # characters
    most_body: int = 1_000_000  # bytes of JSON
    body_seconds: float = 30.0  # that a body may take, and one more for each `body_rate` bytes that came
    body_rate: int = 16_384
    most_upload: int = 20_000_000  # bytes of one picture
    most_files: int = 8
    most_upload_pixels: int = 25_000_000
    held_bytes: int = 4 * 2**30  # of the pixels of all uploads that requests wait or run with

    queue_seconds: float = 600.0  # the longest a picture may wait
    run_seconds: float = 600.0  # the longest a picture may take; a video may take as long as it needs
    link_seconds: float = 3600.0  # how long a picture's address holds
    link_bytes: int = 256 * 2**20  # of pictures that are kept for their addresses
    video_seconds: float = 86_400.0  # how long a finished video is kept
    video_bytes: int = 10 * 2**30  # of videos that are kept
    drain_seconds: float = 30.0  # for running requests after SIGTERM

    def __post_init__(self) -> None:
        if not self.api_key and not loopback(self.host):
            raise InputError(
                f"--host {self.host} can be reached from elsewhere, and no --api-key is set; "
                "set one (or VIVACE_API_KEY), or listen on 127.0.0.1"
            )
        for name in self.allowed_hosts:
            if not re.fullmatch(r"[\w.-]+|[0-9a-fA-F:]+", name, re.ASCII):
                raise InputError(
                    f"--allowed-host {name!r:.100} is no name of a host; leave out what is around it, "
                    "as in draw.example.com"
                )
        if self.api_key is not None and len(self.api_key) < 16:
            raise InputError("--api-key is shorter than 16 characters; take a random one")
        if self.api_key is not None and not re.fullmatch(r"[!-~]+", self.api_key):
            raise InputError("--api-key has characters that no header carries; take letters, digits and signs of ASCII")

    @property
    def most_bytes(self) -> int:
        """Of a request's body with files."""
        return self.most_files * self.most_upload + self.most_body

    @property
    def most_encoded(self) -> int:
        """Of a JSON body that has a picture and its mask in base64."""
        return 2 * -(-self.most_upload * 4 // 3) + self.most_body


def loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
