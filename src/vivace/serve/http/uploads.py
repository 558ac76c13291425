"""Uploaded pictures: only PNG, JPEG and WebP, measured before they are decoded, and nothing kept but the pixels."""

from __future__ import annotations

import asyncio
import io
import warnings

from PIL import Image, ImageOps
from starlette.datastructures import FormData, UploadFile

from vivace.generation.picture import SMALLEST_SIDE, eight_bits
from vivace.serve.http.envelope import ApiError
from vivace.serve.http.settings import Settings

FORMATS = ("PNG", "JPEG", "WEBP")


def decode(raw: bytes, settings: Settings, *, field: str) -> Image.Image:
    """A picture's pixels, upright. Raises ApiError; its text never repeats what a decoder said."""
    if len(raw) > settings.most_upload:
        raise _refusal(field, f"it is larger than {settings.most_upload} bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(raw), formats=FORMATS) as file:
                width, height = file.size
                if width * height > settings.most_upload_pixels or min(width, height) < SMALLEST_SIDE:
                    raise _refusal(
                        field,
                        f"it has {width}x{height} pixels; at least {SMALLEST_SIDE} a side and at most "
                        f"{settings.most_upload_pixels} in all are taken",
                    )
                # What else a camera puts behind a JPEG, such as a preview, makes no animation of it.
                if file.format != "MPO" and getattr(file, "n_frames", 1) != 1:
                    raise _refusal(field, "it is an animation; one frame is taken")
                # A new picture around the pixels alone: no EXIF, no profile, no text goes any further.
                upright = eight_bits(ImageOps.exif_transpose(file))
                plain = upright.convert("RGBA" if _transparent(upright) else "RGB")
                return Image.frombytes(plain.mode, plain.size, plain.tobytes())
    except ApiError:
        raise
    except Exception:
        raise _refusal(field, "it is no PNG, JPEG or WebP picture that can be read") from None


async def pictures(form: FormData, *names: str, settings: Settings) -> list[Image.Image]:
    """The pictures under these names of a form, in order. Raises ApiError."""
    found = [(name, value) for name, value in form.multi_items() if name in names and isinstance(value, UploadFile)]
    return [
        await asyncio.to_thread(decode, await value.read(), settings, field=name.removesuffix("[]"))
        for name, value in found
    ]


def _transparent(picture: Image.Image) -> bool:
    return picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info


def _refusal(field: str, text: str) -> ApiError:
    return ApiError(400, f"{field}: {text}", code="invalid_image", param=field)
