"""The README rehearsed: a fresh root, a fresh clone, its commands up to the page, and a picture drawn in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dockerfile import PROJECT
from root import SYSTEM_PATH, CannotError, Place, Root, joined_network

PAGE = "http://127.0.0.1:7860/ui/"
PATIENCE = 900.0  # seconds, on a machine that does much else
ASK = f"import urllib.request; urllib.request.urlopen({PAGE!r}, timeout=10)"


def commands() -> list[str]:
    """What the README says to type, in order: to install, then to open the page."""
    readme = (PROJECT / "README.md").read_text()
    blocks = [re.search(rf"## {title}\n\n((?: {{4}}.*\n)+)", readme) for title in ("Install", "In the browser")]
    lines = [line for block in blocks if block is not None for line in block[1].splitlines()]
    return [line.split("  #")[0].strip() for line in lines]


def rehearse(root: Root, *, picture: Path | None, told: Callable[[str], None]) -> dict[str, Any]:
    """Type the README's commands as a user of one's own, and draw; what was done, with the seconds of each part.

    `picture` gets the page as it is seen. Raises CannotError, CalledProcessError or AssertionError.
    """
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise CannotError("needs chromium")
    root.run(["useradd", "--create-home", "newcomer"], Place(environment={}))
    folder = "/home/newcomer/vivace"
    clone = root.folder / folder.lstrip("/")
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(PROJECT), str(clone)], check=True)
    root.run(["chown", "-R", "newcomer:newcomer", folder], Place(environment={}))
    # With the environment active, as the README says.
    place = Place(user="newcomer", folder=folder, environment={"PATH": f"{folder}/.venv/bin:{SYSTEM_PATH}"})
    *before, last = commands()
    done = []
    for command in before:
        begun = time.monotonic()
        root.run(["/bin/sh", "-c", command], place)
        done.append({"command": command, "seconds": round(time.monotonic() - begun, 1)})
        told(f"README: {done[-1]['seconds']:6.1f} s  {command}")
    begun = time.monotonic()
    process = root.start(last.split(), place)
    try:
        end = begun + PATIENCE
        while not _there(root, process, place):
            assert process.poll() is None, "it has ended"
            assert time.monotonic() < end, "the page does not come"
            time.sleep(0.5)
        there = round(time.monotonic() - begun, 1)
        facts = {**draw(process, browser, picture=picture), "bytes": root.size()}
    finally:
        process.terminate()
        process.wait(60)
    return {"steps": [*done, {"command": last, "seconds_to_the_page": there}], **facts}


def _there(root: Root, process: subprocess.Popen[bytes], place: Place) -> bool:
    try:
        root.beside(process, ["python3", "-c", ASK], place, timeout=20)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return False
    return True


def draw(process: subprocess.Popen[bytes], browser: str, *, picture: Path | None) -> dict[str, Any]:
    """Draw a picture on the page in a real browser: what it took."""
    with page(process, browser) as found:
        begun = time.monotonic()
        found.goto(PAGE)
        found.locator("body[data-ready]").wait_for()
        usable = time.monotonic() - begun
        found.locator("#prompt textarea").fill("a large red circle left of a small blue square")
        begun = time.monotonic()
        found.locator("#draw").click()
        found.locator("#stage [data-state=done]").wait_for()
        shown = "() => document.querySelector('#stage .frame img')?.naturalWidth"
        found.wait_for_function(f"() => ({shown})() > 0")
        facts = {"page_usable_s": round(usable, 1), "picture_s": round(time.monotonic() - begun, 1)}
        if picture is not None:
            found.screenshot(path=picture)
        return {**facts, "picture_width": found.evaluate(shown), "browser": found.context.browser.version}


@contextmanager
def page(process: subprocess.Popen[bytes], browser: str) -> Iterator[Any]:
    """A page of a browser that sees the network of `process`, which is nobody else's."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as running:
        # What playwright starts has to be one file.
        wrapper = Path(f"/tmp/browser-{process.pid}")
        wrapper.write_text(f'#!/bin/sh\nexec {" ".join(joined_network(process))} {browser} "$@"\n')
        wrapper.chmod(0o755)
        try:
            found = running.chromium.launch(executable_path=wrapper, args=["--disable-gpu", "--no-sandbox"])
            opened = found.new_page(viewport={"width": 1280, "height": 900})
            opened.set_default_timeout(PATIENCE * 1000)
            yield opened
            found.close()
        finally:
            wrapper.unlink()
