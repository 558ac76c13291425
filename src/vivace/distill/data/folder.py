"""A folder of pictures, each with its caption beside it: `frog.jpg` with `frog.txt` or `frog.json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vivace.distill.data.sample import PICTURES, Place, Refused
from vivace.errors import InputError


class Folder:
    """The pictures below a folder; every folder with pictures counts as one shard."""

    def __init__(self, path: str) -> None:
        self.root = Path(path).expanduser()
        if not self.root.is_dir():
            raise InputError(f"no folder {self.root}; check data.path")
        self.files: dict[Place, dict[str, Path]] = {}
        for file in sorted(self.root.rglob("*")):
            # Further pictures of a sample have a second name, as in a shard: frog.control.png
            name, dot, extension = file.name.partition(".")
            if name and dot and file.is_file():
                place = Place(str(file.parent.relative_to(self.root)), name)
                self.files.setdefault(place, {})[extension.lower()] = file
        self.found: dict[str, list[Place]] = {}
        for place, files in self.files.items():
            if not PICTURES.keys().isdisjoint(files):
                self.found.setdefault(place.shard, []).append(place)
        if not self.found:
            raise InputError(f"{self.root} holds no pictures ({', '.join(PICTURES)}); check data.path")

    def shards(self) -> list[str]:
        """The folders with pictures."""
        return list(self.found)

    def places(self, shard: str) -> list[Place]:
        """The pictures of a folder."""
        return self.found[shard]

    def problem(self, shard: str) -> str | None:
        """What is wrong with a folder as a whole: nothing, once it was listed."""
        return None

    def read(self, place: Place) -> Mapping[str, bytes]:
        """A sample's files by extension. Raises Refused."""
        try:
            return {extension: file.read_bytes() for extension, file in self.files.get(place, {}).items()}
        except OSError as error:
            raise Refused("a file that cannot be read", broken=True) from error
