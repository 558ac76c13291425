"""The Dockerfiles: what can be checked of them without an engine, and their steps in a fresh folder."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = ("Dockerfile", "Dockerfile.cuda")
KNOWN = {"FROM", "RUN", "WORKDIR", "COPY", "ARG", "USER", "ENV", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"}
KEY = "a-key-of-the-tests-alone"
TORCH = "\"$(grep '^torch==' constraints.txt)\""


@dataclass(frozen=True)
class Step:
    """One instruction."""

    kind: str
    rest: str

    @property
    def list(self) -> list[str]:
        """Its arguments in the form that starts no shell."""
        return json.loads(self.rest[self.rest.index("[") :])


def steps(name: str) -> list[Step]:
    """A Dockerfile's instructions, without comments, continued lines joined."""
    lines = [line for line in (ROOT / "docker" / name).read_text().splitlines() if not line.lstrip().startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [Step(*line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def of(name: str, kind: str) -> list[Step]:
    return [step for step in steps(name) if step.kind == kind]


@pytest.fixture(params=FILES)
def name(request) -> str:
    return request.param


def test_every_step_is_known(name):
    found = steps(name)
    assert {step.kind for step in found} <= KNOWN
    assert found[0].kind == "FROM"
    assert re.fullmatch(r"python:3\.1[1-9]-slim", found[0].rest)
    for step in of(name, "RUN"):
        subprocess.run(["sh", "-n", "-c", step.rest], check=True)
        for command in re.split(r"&&|\|\|?|;", re.sub(r"\$\([^)]*\)", "x", step.rest)):
            first = command.split()[0]
            # What the base image has, or a step before has made.
            assert first in ("useradd", "apt-get", "rm", "python3", ".venv/bin/pip"), first


def test_what_is_copied_is_there(name):
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert (ROOT / ".dockerignore").read_text().splitlines()[0] == "*"
    copied = [source for step in of(name, "COPY") for source in step.rest.split()[:-1]]
    assert set(copied) == allowed
    for source in copied:
        assert (ROOT / source).exists(), source
    # The build reads these from the project's description.
    description = (ROOT / "pyproject.toml").read_text()
    for needed in re.findall(r'^(?:readme|license-files) = \[?"([^"]+)"', description, re.MULTILINE):
        assert needed in copied


def test_the_steps_are_the_readme_s(name):
    readme = (ROOT / "README.md").read_text()
    told = re.search(r"## Install\n\n((?: {4}.*\n)+)", readme)
    assert told is not None
    venv, torch, rest = (line.strip() for line in told[1].splitlines())
    runs = [step.rest for step in of(name, "RUN") if "apt-get" not in step.rest and "useradd" not in step.rest]
    assert runs[0] == venv
    pinned = re.search(r"^torch==.*$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert torch.endswith(pinned[0])
    assert runs[1].startswith(".venv/bin/pip install")
    assert runs[1].endswith(TORCH)
    assert [word for word in shlex.split(rest) if word not in ("-e", ".")] == [
        word for word in shlex.split(runs[2]) if word != "--no-cache-dir" and not word.startswith(".[")
    ]
    assert len(runs) == 3


def test_the_extras_exist_and_everything_is_pinned(name):
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {re.split("==", line)[0].lower().replace("_", "-") for line in _constraints()}
    extras = re.search(r"'\.\[([^\]]+)\]'", of(name, "RUN")[-1].rest)
    assert extras is not None
    wanted = list(extras[1].split(","))
    for extra in wanted:
        for requirement in project["optional-dependencies"][extra]:
            inner = re.fullmatch(r"vivace\[(.+)\]", requirement)
            if inner:
                wanted.extend(inner[1].split(","))
            else:
                assert re.split(r"[<>=;\[ ]", requirement)[0].lower() in pinned, requirement
    for requirement in project["dependencies"]:
        assert re.split(r"[<>=;\[ ]", requirement)[0].lower().replace("_", "-") in pinned, requirement


def test_the_image_of_the_kubernetes_example_has_ray():
    assert "vivace:cuda" in (ROOT / "docs" / "rayservice.yaml").read_text()
    extras = re.search(r"'\.\[([^\]]+)\]'", of("Dockerfile.cuda", "RUN")[-1].rest)
    assert extras is not None
    assert "ray" in extras[1].split(",")


def _constraints() -> list[str]:
    return [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]


def test_it_runs_as_nobody_special(name):
    kinds = [step.kind for step in steps(name)]
    user = kinds.index("USER")
    assert of(name, "USER")[-1].rest not in ("root", "0")
    assert of(name, "USER")[-1].rest in of(name, "RUN")[0].rest + of(name, "RUN")[1].rest
    assert not {"RUN", "COPY"} & set(kinds[user:])


def test_its_health_is_asked_without_a_key(name):
    from vivace.serve.http.guard import OPEN

    (health,) = of(name, "HEALTHCHECK")
    address = re.search(r"http://127\.0\.0\.1:(\d+)(/\w+)", health.list[-1])
    assert address is not None
    assert address[1] == of(name, "EXPOSE")[0].rest
    assert address[2] in OPEN


def test_it_is_published_only_with_a_key(name, monkeypatch, capsys):
    from vivace.cli import main

    monkeypatch.delenv("VIVACE_API_KEY", raising=False)
    (entry,), (command,) = of(name, "ENTRYPOINT"), of(name, "CMD")
    assert entry.list == ["vivace"]
    with pytest.raises(SystemExit) as ended:
        main(command.list)
    assert ended.value.code == 2
    assert "no --api-key is set" in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.timeout(3000)
def test_the_steps_one_by_one(tmp_path):
    """Every step of the CPU's Dockerfile in a folder that stands for the image's root, then the server itself."""
    where, environment, process = tmp_path / "opt/vivace", {"PATH": os.environ["PATH"]}, None
    for step in steps("Dockerfile"):
        if step.kind == "WORKDIR":
            where = tmp_path / step.rest.lstrip("/")
            where.mkdir(parents=True, exist_ok=True)
        elif step.kind == "COPY":
            *sources, to = step.rest.split()
            for source in sources:
                _copy(ROOT / source, where / to if (ROOT / source).is_dir() else where / to / source)
        elif step.kind == "RUN" and "useradd" not in step.rest:
            command = step.rest.replace("python3 -m venv", f"{shlex.quote(sys.executable)} -m venv")
            inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
            subprocess.run(["sh", "-ec", command], cwd=where, env=inherited, check=True)
        elif step.kind == "ENV":
            name, _, value = step.rest.partition("=")
            environment[name] = value.replace("/opt/", f"{tmp_path}/opt/").replace("$PATH", environment["PATH"])
        elif step.kind == "CMD":
            port = _free()
            command = [str(tmp_path / "opt/vivace/.venv/bin/vivace"), *step.list, "--port", str(port)]
            process = subprocess.Popen(command, cwd=where, env={**environment, "VIVACE_API_KEY": KEY})
    assert process is not None
    try:
        health = of("Dockerfile", "HEALTHCHECK")[0].list[-1].replace(":8000/", f":{port}/")
        python = str(tmp_path / "opt/vivace/.venv/bin/python")
        end = time.monotonic() + 600
        while subprocess.run([python, "-c", health], capture_output=True).returncode:
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(1)
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/ui/", timeout=60)
        wanted = json.dumps({"prompt": "a red circle", "steps": 2}).encode()
        headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
        asked = urllib.request.Request(f"http://127.0.0.1:{port}/v1/images/generations", wanted, headers)
        assert json.load(urllib.request.urlopen(asked, timeout=300))["data"][0]["b64_json"]
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()


def _copy(source: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, to, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    else:
        shutil.copy(source, to)


def _free() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
