"""A Debian of its own in a folder: what stands for a base image where no engine can fetch one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

# Beyond Debian's smallest, what the slim images of Python have, by the names of Debian 13 and later.
PACKAGES = (
    "ca-certificates,netbase,tzdata,libbz2-1.0,libffi8,liblzma5,libncursesw6,libreadline8t64,libsqlite3-0,libssl3t64"
)
MOUNTS = 'mount --rbind /dev "$1/dev" && mount -t proc proc "$1/proc" && shift && exec "$@"'
OFFLINE = 'ip link set lo up && exec "$@"'
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
# As an engine does with what its machine needs to reach others: the build sees it, the container does not.
REACH = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "PIP_CERT")
SPACE = 12 * 2**30  # bytes of disk: of torch with CUDA alone it takes six
TOOLS = ("debootstrap", "unshare", "nsenter", "chroot", "ip")


class CannotError(Exception):
    """Why this machine can make no root."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where and as whom a command runs inside."""

    user: str = "root"
    folder: str = "/"
    environment: Mapping[str, str]


class Root:
    """A folder that commands take for the whole disk. Each has mounts of its own, which end with it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def fresh(cls, folder: Path, *, debian: str, python: str) -> Root:
        """Debian's smallest with the files of the interpreter `python`, of this machine, in /usr/local.

        Raises CannotError for what this machine lacks.
        """
        if os.geteuid() != 0:
            raise CannotError("needs to be root")
        if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
            raise CannotError(f"needs {', '.join(missing)}")
        if shutil.disk_usage(folder.parent).free < SPACE:
            raise CannotError(f"needs {SPACE >> 30} GiB in {folder.parent}")
        # In mounts of its own, so that none of its is left where it fails.
        made = ["unshare", "--mount", "debootstrap", "--variant=minbase", f"--include={PACKAGES}", debian, str(folder)]
        done = subprocess.run(made, capture_output=True, text=True)
        if done.returncode:
            raise CannotError(f"debootstrap makes no Debian here: {(done.stdout + done.stderr).strip()[-300:]}")
        for name in ("/etc/resolv.conf", CERTIFICATES):
            shutil.copy(name, folder / name.lstrip("/"))
        root = cls(folder)
        root._add(python)
        return root

    def _add(self, python: str) -> None:
        told = "import sys, ensurepip; print(sys.base_prefix, '%d.%d' % sys.version_info[:2])"
        prefix, version = subprocess.run(
            [python, "-c", told], check=True, capture_output=True, text=True
        ).stdout.split()
        name, local = f"python{version}", self.folder / "usr/local"
        left = shutil.ignore_patterns("__pycache__", "site-packages", "dist-packages", "config-*", "test")
        for part in ("lib", "include"):
            shutil.copytree(Path(prefix, part, name), local / part / name, ignore=left)
        for library in Path(prefix, "lib").glob(f"libpython{version}.so*"):
            shutil.copy(library, local / "lib")
        shutil.copy(Path(prefix, "bin", name), local / "bin")
        (local / "bin/python3").symlink_to(name)
        subprocess.run(["chroot", str(self.folder), "ldconfig"], check=True)

    def run(self, command: Sequence[str], place: Place) -> None:
        """Raises CalledProcessError where it fails, after what it said."""
        reach = {name: os.environ[name] for name in REACH if name in os.environ}
        place = replace(place, environment={**reach, **place.environment})
        done = subprocess.run(self._entered(command, place), capture_output=True)
        if done.returncode:
            sys.stderr.buffer.write(done.stdout[-20_000:] + done.stderr[-20_000:])
        done.check_returncode()

    def ask(self, command: Sequence[str], place: Place) -> str:
        """What a command prints. Raises CalledProcessError where it fails."""
        return subprocess.run(self._entered(command, place), check=True, stdout=subprocess.PIPE, text=True).stdout

    def start(self, command: Sequence[str], place: Place) -> subprocess.Popen[bytes]:
        """A process that reaches no other machine, nor is reached: its network is its own."""
        alone = ["unshare", "--net", "sh", "-c", OFFLINE, "sh"]
        return subprocess.Popen([*alone, *self._entered(command, place)])

    def beside(self, process: subprocess.Popen[bytes], command: Sequence[str], place: Place, *, timeout: float) -> str:
        """What a command prints that sees the disk and the network of a process of `start`'s.

        Raises CalledProcessError where it fails, TimeoutExpired.
        """
        joined = [*joined_network(process), "--mount", *self._changed(command, place)]
        done = subprocess.run(joined, check=True, capture_output=True, text=True, timeout=timeout)
        return done.stdout

    def home(self, user: str) -> str:
        """The folder of a user, as the root's own list of them has it."""
        lines = (self.folder / "etc/passwd").read_text().splitlines()
        return next(line.split(":")[5] for line in lines if line.split(":")[0] == user)

    def size(self) -> int:
        """Bytes on disk."""
        told = subprocess.run(["du", "-sx", "--block-size=1", str(self.folder)], check=True, capture_output=True)
        return int(told.stdout.split()[0])

    def _entered(self, command: Sequence[str], place: Place) -> list[str]:
        # No shell and no child of ours stays between: a signal to the process reaches the command.
        mounted = ["unshare", "--mount", "sh", "-c", MOUNTS, "sh", str(self.folder)]
        return [*mounted, *self._changed(command, place)]

    def _changed(self, command: Sequence[str], place: Place) -> list[str]:
        settings = {"PATH": SYSTEM_PATH, "HOME": self.home(place.user), **place.environment}
        clean = ["env", "-i", f"--chdir={place.folder}", *(f"{name}={value}" for name, value in settings.items())]
        return ["chroot", f"--userspec={place.user}:{place.user}", str(self.folder), *clean, *command]


def joined_network(process: subprocess.Popen[bytes]) -> list[str]:
    """What a command begins with that is to see the network of a process of `start`'s."""
    return ["nsenter", f"--target={process.pid}", "--net"]
