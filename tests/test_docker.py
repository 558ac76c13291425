"""The Dockerfiles: what can be checked of them as text, and, where this machine can, their being carried out."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent
FILES = ("Dockerfile", "Dockerfile.cuda")
TORCH = "\"$(grep '^torch==' constraints.txt)\""


def module(name):
    """One of docker/, whose modules import each other by their bare names."""
    sys.path.insert(0, str(ROOT / "docker"))
    try:
        return import_module(name)
    finally:
        sys.path.remove(str(ROOT / "docker"))


dockerfile = module("dockerfile")
steps = dockerfile.steps


def of(name: str, kind: str) -> list:
    return [step for step in steps(name) if step.kind == kind]


@pytest.fixture(params=FILES)
def name(request) -> str:
    return request.param


def test_every_step_is_known(name):
    found = steps(name)
    assert found[0].kind == "FROM"
    version, debian = dockerfile.base(name)
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert int(version.removeprefix("3.")) >= int(requires.removeprefix(">=3."))
    assert debian.isalpha()
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


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_its_health_is_asked_past_a_proxy(name, status, healthy):
    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    ((python, *arguments),) = (step.list for step in of(name, "HEALTHCHECK"))
    assert python == "python"
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [sys.executable, *(word.replace(":8000/", f":{server.server_port}/") for word in arguments)]
        # Nobody listens there.
        environment = {**os.environ, "http_proxy": "http://127.0.0.1:1", "no_proxy": ""}
        done = subprocess.run(command, env=environment, capture_output=True, timeout=240)
        server.shutdown()
    assert (done.returncode == 0) is healthy, done.stderr


def test_it_is_published_only_with_a_key(name, monkeypatch, capsys):
    from vivace.cli import main

    monkeypatch.delenv("VIVACE_API_KEY", raising=False)
    (entry,), (command,) = of(name, "ENTRYPOINT"), of(name, "CMD")
    assert entry.list == ["vivace"]
    with pytest.raises(SystemExit) as ended:
        main(command.list)
    assert ended.value.code == 2
    assert "no --api-key is set" in capsys.readouterr().err


def test_steps_do_what_an_engine_does(tmp_path):
    """Those that need no root of their own; the whole of it is below."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text("vivace:x:10001:10001::/home/vivace:/bin/sh\n")
    root, step = module("root"), dockerfile.Step
    image = dockerfile.Image(root=root.Root(tmp_path), place=root.Place(environment={"A": "1"}))
    for kind, rest in [("WORKDIR", "/opt/a"), ("ENV", "PATH=/b:$PATH C=$A"), ("ARG", 'D=""'), ("USER", "vivace")]:
        image.apply(step(kind, rest))
    assert (tmp_path / "opt/a").is_dir()
    place = root.Place(user="vivace", folder="/opt/a", environment=image.place.environment)
    assert image.place == place
    assert place.environment == {"A": "1", "C": "1", "PATH": f"/b:{root.SYSTEM_PATH}"}
    assert image.arguments == {"D": ""}
    for kind, rest, error in [("USER", "nobody-else", StopIteration), ("VOLUME", "/a", ValueError)]:
        with pytest.raises(error):
            image.apply(step(kind, rest))


def test_what_the_readme_says_to_type():
    *before, last = module("newcomer").commands()
    assert last == "vivace ui"
    assert len(before) == 4
    assert all(command.split()[0] in ("python3", "pip", ".venv/bin/pip") for command in before)
    assert ". .venv/bin/activate" in (ROOT / "README.md").read_text(), "pip alone is another environment's"


@pytest.fixture
def reachable(tmp_path):
    """Skips where the package index is not reached."""
    asked = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", "iniconfig"]
    if subprocess.run([*asked, "-d", str(tmp_path)], capture_output=True).returncode:
        pytest.skip("the package index is not reached")


def rehearsed(name: str) -> SimpleNamespace:
    rehearse = module("rehearse")
    try:
        return SimpleNamespace(**rehearse.rehearse(name))
    except module("root").CannotError as reason:
        pytest.skip(str(reason))


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_the_steps_one_by_one_in_a_fresh_root(name, reachable):
    """Gigabytes and minutes each. All of it but the GPU: of the CUDA file too, whose server then draws on the CPU."""
    found = rehearsed(name)
    assert [one["step"].split()[0] for one in found.steps] == [step.kind for step in steps(name)[1:]]
    container = found.container
    assert container["user"] == 10001
    assert container["without_key"] == {"/ui/": 401, "/v1/models": 401, "/readyz": 200}
    assert (container["without_key_exit"], container["sigterm_exit"]) == (2, 0)
    assert container["picture_bytes"] > 1000
    assert found.not_pinned == ["pip", "vivace"]
    assert hasattr(found, "compiles") == ("gcc" in of(name, "RUN")[0].rest)


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_the_readme_on_a_fresh_machine(reachable):
    """A clone, the README's commands, `vivace ui`, and a picture in a real browser."""
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = rehearsed("README.md")
    assert [one["command"] for one in found.steps] == module("newcomer").commands()
    assert found.picture_width == 256
