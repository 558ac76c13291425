"""Rehearses what a fresh machine does, where no engine can: `make rehearsal` writes benchmarks/<date>-rehearsal.json.

    python docker/rehearse.py [Dockerfile] [Dockerfile.cuda] [README.md] [-o FILE] [--python INTERPRETER]

Each in a fresh Debian in a temporary folder, as root, with ten gigabytes of disk and Debian's and Python's packages
within reach. What cannot be had is the base image: debootstrap's Debian of the same name stands for it, with the files
of an interpreter of this machine, of the image's version where there is one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import container
import newcomer
from dockerfile import base
from root import CannotError, Root

from vivace.machine import machine

ALL = ("Dockerfile", "Dockerfile.cuda", "README.md")


def rehearse(name: str, *, python: str | None = None, picture: Path | None = None) -> dict[str, Any]:
    """What came of one of them. Raises CannotError where this machine cannot, and what failed."""
    wanted, debian = base("Dockerfile" if name == "README.md" else name)
    interpreter = python or found(wanted)
    with tempfile.TemporaryDirectory(prefix="vivace-rehearsal-") as folder:
        begun = time.monotonic()
        root = Root.fresh(Path(folder, "root"), debian=debian, python=interpreter)
        of = subprocess.run([interpreter, "--version"], check=True, capture_output=True, text=True).stdout.strip()
        facts = {"debian": debian, "python": of, "base_s": round(time.monotonic() - begun, 1)}
        if name == "README.md":
            return facts | newcomer.rehearse(root, picture=picture, told=_told)
        return facts | container.rehearse(name, root, told=_told)


def origin(name: str, *, python: str | None) -> dict[str, Any]:
    """What a record says of where it comes from; each was rehearsed by itself, whatever stands beside it."""
    chosen = f" --python {Path(python).name}" if python else ""
    date = datetime.now(UTC).date().isoformat()
    return {"command": f"python docker/rehearse.py {name}{chosen}", "date": date, "machine": machine(gpus=False)}


def found(version: str) -> str:
    """An interpreter of a version, or the one that runs this."""
    there = shutil.which(f"python{version}")
    works = there and subprocess.run([there, "--version"], capture_output=True).returncode == 0
    return there if there and works else sys.executable


def _told(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    """Rehearse what is asked for; 0 where all of it holds."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("names", nargs="*", choices=ALL, default=[*ALL])
    kept = "Where the record goes, as JSON; what it has of others stays."
    asked.add_argument("-o", "--output", type=Path, help=kept)
    asked.add_argument("--picture", type=Path, help="Where the page goes, as a browser shows it.")
    asked.add_argument("--python", help="The interpreter whose files the root gets.")
    given = asked.parse_args()
    record = json.loads(given.output.read_text()) if given.output and given.output.exists() else {}
    for name in given.names:
        try:
            record[name] = origin(name, python=given.python) | rehearse(
                name, python=given.python, picture=given.picture
            )
        except CannotError as error:
            print(f"rehearse: {error}", file=sys.stderr)
            return 2
        if given.output:
            given.output.write_text(json.dumps(record, indent=1) + "\n")
    if not given.output:
        print(json.dumps(record, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
