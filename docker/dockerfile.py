"""A Dockerfile's instructions, and their being carried out one by one in a root, without an engine."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from string import Template
from typing import Any

from root import SYSTEM_PATH, Place, Root

PROJECT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Step:
    """One instruction."""

    kind: str
    rest: str

    @property
    def list(self) -> list[str]:
        """Its arguments in the form that starts no shell."""
        return json.loads(self.rest[self.rest.index("[") :])

    @property
    def settings(self) -> dict[str, str]:
        """What ENV and ARG set."""
        return dict(word.split("=", 1) for word in shlex.split(self.rest))


def steps(name: str) -> list[Step]:
    """The instructions of `docker/<name>`, without comments, continued lines joined."""
    lines = [line for line in (PROJECT / "docker" / name).read_text().splitlines() if not line.lstrip().startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [Step(*line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


@dataclass(kw_only=True)
class Image:
    """What the steps have made so far, and what a container of it is to do."""

    root: Root
    place: Place
    arguments: dict[str, str] = field(default_factory=dict)  # of the build alone
    commands: dict[str, list[str]] = field(default_factory=dict)  # HEALTHCHECK, ENTRYPOINT and CMD

    def apply(self, step: Step) -> None:
        """Carry one step out, as an engine would. Raises CalledProcessError where it fails, ValueError."""
        match step.kind:
            case "RUN":
                place = replace(self.place, environment={**self.arguments, **self.place.environment})
                self.root.run(["/bin/sh", "-c", step.rest], place)
            case "COPY":
                self._copy(*step.rest.split())
            case "WORKDIR":
                self._inside(step.rest).mkdir(parents=True, exist_ok=True)
                self.place = replace(self.place, folder=step.rest)
            case "USER":
                self.root.home(step.rest)  # raises where there is none
                self.place = replace(self.place, user=step.rest)
            case "ARG":
                self.arguments |= step.settings
            case "ENV":
                known = {"PATH": SYSTEM_PATH, **self.place.environment}
                new = {name: Template(value).substitute(known) for name, value in step.settings.items()}
                self.place = replace(self.place, environment={**self.place.environment, **new})
            case "EXPOSE":
                int(step.rest)  # only tells whoever runs it
            case "HEALTHCHECK" | "ENTRYPOINT" | "CMD":
                self.commands[step.kind] = step.list
            case unknown:
                raise ValueError(f"{unknown} is not known here")

    def _copy(self, *paths: str) -> None:
        *sources, to = paths
        where = self._inside(to)
        for name in sources:
            if (PROJECT / name).is_dir():  # what is in it goes where it goes
                shutil.copytree(PROJECT / name, where, ignore=ignored(), dirs_exist_ok=True)
            else:
                shutil.copy(PROJECT / name, where)
        subprocess.run(["chown", "-R", "0:0", str(where)], check=True)

    def _inside(self, path: str) -> Path:
        return self.root.folder / str(PurePosixPath(self.place.folder, path)).lstrip("/")


def ignored() -> Callable[[Any, list[str]], set[str]]:
    """What .dockerignore leaves out of the folders that it lets in."""
    lines = (PROJECT / ".dockerignore").read_text().splitlines()
    return shutil.ignore_patterns(*(line.removeprefix("**/") for line in lines if line.startswith("**/")))


def base(name: str) -> tuple[str, str]:
    """The Python and the Debian that the first step asks for."""
    found = re.fullmatch(r"python:(3\.\d+)-slim-(\w+)", steps(name)[0].rest)
    assert found is not None
    return found[1], found[2]
