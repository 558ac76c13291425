"""Videos on disk: H.264 in mp4 through PyAV (the `[video]` extra), with what made them in the container's comment."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vivace.errors import InputError, install
from vivace.generation.picture import whole

if TYPE_CHECKING:
    from PIL import Image


def require() -> Any:
    """The PyAV module. Raises InputError that says what to install."""
    try:
        import av
    except ImportError as error:
        raise InputError(f"videos need PyAV; install it with: {install('video')}") from error
    return av


def write(
    frames: Sequence[Image.Image], path: Path, *, fps: int, prompt: str, seed: int, settings: Mapping[str, Any]
) -> None:
    """Write `frames` at `fps` frames a second. H.264 needs even sides: an odd last row or column is dropped."""
    av = require()
    width, height = (side - side % 2 for side in frames[0].size)
    with whole(path) as part, av.open(str(part), "w", format="mp4") as container:
        facts = {"prompt": prompt, "seed": seed, "settings": settings}
        container.metadata["comment"] = json.dumps(facts, sort_keys=True)
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": "17"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            picture = av.VideoFrame.from_image(frame.convert("RGB").crop((0, 0, width, height)))
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def facts(path: Path) -> dict[str, Any]:
    """What `write` put into an mp4: prompt, seed and settings. Raises InputError where it carries none."""
    av = require()
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            made = json.loads(container.metadata["comment"])
            return {"path": str(path), "size": [stream.width, stream.height], "frames": stream.frames, **made}
    except (KeyError, ValueError, IndexError, OSError) as error:
        raise InputError(f"{path} does not say how it was made; only videos written by vivace do") from error
