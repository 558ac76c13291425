"""Pictures on disk: read and checked on the way in, written whole and with what made them on the way out."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vivace.errors import InputError

if TYPE_CHECKING:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

KEYS = ("prompt", "seed", "settings")
SMALLEST_SIDE = 8  # pixels
LONGEST_ASPECT = 16
MOST_PIXELS = 100_000_000
KEPT = 40  # characters of a name


def read(path: Path, *, mode: str = "RGB") -> Image.Image:
    """An input picture, turned upright, in `mode`. Raises InputError for what is missing, unreadable or absurd."""
    from PIL import Image, ImageOps

    if not os.path.isfile(path):
        raise InputError(f"no picture {path}; check the path")
    try:
        with Image.open(path) as file:
            width, height = file.size
            if min(width, height) < SMALLEST_SIDE or width * height > MOST_PIXELS:
                raise InputError(
                    f"{path} has {width}x{height} pixels; a picture needs sides of at least {SMALLEST_SIDE} and "
                    f"at most {MOST_PIXELS // 1_000_000} megapixels in all"
                )
            if max(width, height) > LONGEST_ASPECT * min(width, height):
                raise InputError(f"{path} is {width}x{height}, longer than {LONGEST_ASPECT} to 1; crop it first")
            return eight_bits(ImageOps.exif_transpose(file)).convert(mode)
    except InputError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is not a picture that can be read; give a PNG, JPEG or WebP file") from error


def eight_bits(picture: Image.Image) -> Image.Image:
    """The picture; of 16 grey bits the upper eight, where Pillow would make everything above 255 white."""
    if not picture.mode.startswith("I"):
        return picture
    return picture.convert("I").point(lambda grey: grey * (1 / 257)).convert("L")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; it takes the place of `path` when the block ends, and is removed on any error."""
    # The end of the stem, which tells numbered pictures apart: a name may be as long as the file system takes.
    part = path.with_name(f".{path.stem[-KEPT:]}.{os.getpid()}{path.suffix}")
    try:
        yield part
        os.replace(part, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; choose another place with -o") from error
    finally:
        part.unlink(missing_ok=True)


def write(picture: Image.Image, path: Path, *, prompt: str, seed: int, settings: Mapping[str, Any]) -> None:
    """Write a PNG that carries its prompt, seed and settings in text chunks.

    The bytes depend on nothing else, so the same picture made the same way is the same file.
    """
    with whole(path) as part:
        picture.save(part, format="PNG", pnginfo=chunks(prompt=prompt, seed=seed, settings=settings))


def chunks(*, prompt: str, seed: int, settings: Mapping[str, Any]) -> PngInfo:
    """The text chunks of a PNG that say how it was made."""
    from PIL.PngImagePlugin import PngInfo

    found = PngInfo()
    for key, value in zip(KEYS, (prompt, str(seed), json.dumps(settings, sort_keys=True)), strict=True):
        found.add_itxt(key, value)
    return found


def facts(path: Path) -> dict[str, Any]:
    """What `write` put into a PNG: prompt, seed and settings. Raises InputError where a picture carries none."""
    from PIL import Image

    if not os.path.isfile(path):
        raise InputError(f"no picture {path}; check the path")
    try:
        with Image.open(path) as file:
            file.load()
            text = dict(getattr(file, "text", {}))
            size = file.size
        settings = {key: text[key] for key in KEYS}
        return {
            "path": str(path),
            "size": list(size),
            "prompt": settings["prompt"],
            "seed": int(settings["seed"]),
            "settings": json.loads(settings["settings"]),
        }
    except (KeyError, ValueError) as error:
        raise InputError(f"{path} does not say how it was made; only PNG files written by vivace do") from error
    except (OSError, SyntaxError) as error:
        raise InputError(f"{path} is not a picture that can be read; give a PNG file written by vivace") from error
