"""A Dockerfile rehearsed: its steps in a fresh root, then a container of what they made, asked for a picture."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from dockerfile import PROJECT, Image, steps
from root import Place, Root

KEY = "a-key-of-the-rehearsal-alone"
PATIENCE = 900.0  # seconds, on a machine that does much else
CLIENT = f"""
import json, urllib.error, urllib.request
from base64 import b64decode
at, body = "http://127.0.0.1:8000", json.dumps({{"prompt": "a red circle", "steps": 2}}).encode()
def ask(path, body=None, **headers):
    try:
        answer = urllib.request.urlopen(urllib.request.Request(at + path, body, headers), timeout={PATIENCE})
        return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
known = {{"authorization": "Bearer {KEY}", "content-type": "application/json"}}
status, answer = ask("/v1/images/generations", body, **known)
assert status == 200, answer
told = {{"picture_bytes": len(b64decode(json.loads(answer)["data"][0]["b64_json"]))}}
told["without_key"] = {{path: ask(path)[0] for path in ("/ui/", "/v1/models", "/readyz")}}
print(json.dumps(told))
"""

INSTALLED = """
import json
from importlib.metadata import distributions
found = list(distributions())
exactly = [one for dist in found for one in dist.requires or () if "==" in one.partition(";")[0]]
print(json.dumps({"installed": {dist.name: dist.version for dist in found}, "exactly": exactly}))
"""
# What Triton does on a GPU before it launches a kernel: a module of Python's in C, compiled by who runs it.
COMPILED = """
import subprocess, sys, sysconfig
code = "#include <Python.h>\\nstatic struct PyModuleDef d = {PyModuleDef_HEAD_INIT, \\"tried\\"};"
open("tried.c", "w").write(code + "PyMODINIT_FUNC PyInit_tried(void) { return PyModule_Create(&d); }")
gcc = ["gcc", "-shared", "-fPIC", "-I", sysconfig.get_path("include"), "tried.c", "-o", "tried.so"]
subprocess.run(gcc, check=True)
sys.path.insert(0, "")
import tried
"""


def rehearse(name: str, root: Root, *, told: Callable[[str], None]) -> dict[str, Any]:
    """Carry out `docker/<name>` and use what it makes; what was done, with the seconds of each part.

    Raises CalledProcessError or AssertionError for what does not hold.
    """
    image, done = Image(root=root, place=Place(environment={})), []
    for step in steps(name)[1:]:  # the root stands for the first
        begun = time.monotonic()
        image.apply(step)
        done.append({"step": f"{step.kind} {step.rest}", "seconds": round(time.monotonic() - begun, 1)})
        told(f"{name}: {done[-1]['seconds']:6.1f} s  {done[-1]['step']}")
    facts = {"bytes": root.size(), "not_pinned": not_pinned(image)}
    if (root.folder / "usr/bin/gcc").exists():
        root.ask([image.commands["HEALTHCHECK"][0], "-c", COMPILED], image.place)
        facts["compiles"] = True
    return {"steps": done, **facts, "container": container(image)}


def not_pinned(image: Image) -> list[str]:
    """What is installed in a version that neither constraints.txt nor another package names; else it is as they say."""
    lines = (PROJECT / "constraints.txt").read_text().splitlines()
    pinned = {_name(line): line.split("==")[1] for line in lines if "==" in line}
    python = image.commands["HEALTHCHECK"][0]
    told = json.loads(image.root.ask([python, "-c", INSTALLED], image.place))
    installed = {_name(name): version for name, version in told["installed"].items()}
    wrong = {name: version for name, version in installed.items() if pinned.get(name, version) != version}
    assert not wrong, f"not as constraints.txt says: {wrong}"
    return sorted(installed.keys() - pinned.keys() - {_name(one) for one in told["exactly"]})


def _name(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement)[0]).lower()


def container(image: Image) -> dict[str, Any]:
    """What a container of an image does: without a key, then with one until SIGTERM."""
    command = [*image.commands["ENTRYPOINT"], *image.commands["CMD"]]
    refused = image.root.start(command, image.place)
    assert refused.wait(PATIENCE) == 2, "without a key it has to end at once"
    keyed = replace(image.place, environment={**image.place.environment, "VIVACE_API_KEY": KEY})
    begun, process = time.monotonic(), image.root.start(command, keyed)
    try:
        tries = until_healthy(process, image)
        ready = time.monotonic() - begun
        python = [image.commands["HEALTHCHECK"][0], "-c", CLIENT]
        answers = json.loads(image.root.beside(process, python, image.place, timeout=PATIENCE))
        user = Path(f"/proc/{process.pid}/status").read_text().split("Uid:")[1].split()[0]
        process.send_signal(signal.SIGTERM)
        facts = {"user": int(user), "healthy_after_s": round(ready, 1), "health_checks": tries, **answers}
        return {"without_key_exit": 2, **facts, "sigterm_exit": process.wait(PATIENCE)}
    finally:
        process.kill()


def until_healthy(process: subprocess.Popen[bytes], image: Image) -> int:
    """Run the health check until it passes; how often it took."""
    end, tries = time.monotonic() + PATIENCE, 0
    while True:
        assert process.poll() is None, "it has ended"
        assert time.monotonic() < end, "it does not become healthy"
        tries += 1
        try:
            image.root.beside(process, image.commands["HEALTHCHECK"], image.place, timeout=10)
            return tries
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
            time.sleep(1)
