"""Pictures to edit: taken by the server's own upload, checked like the API's, kept in memory for a while."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from vivace.serve.failures import FieldError
from vivace.serve.http.envelope import ApiError
from vivace.serve.http.images import mask_of
from vivace.serve.http.kept import Kept
from vivace.serve.http.server import read_form, server_of
from vivace.serve.http.uploads import pictures

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Input:
    """A picture to edit, and where: white in the mask is painted anew."""

    image: Image.Image
    mask: Image.Image | None

    @property
    def nbytes(self) -> int:
        return sum(len(one.getbands()) * one.width * one.height for one in (self.image, self.mask) if one is not None)


class Inputs:
    """Uploaded pictures by a name that nobody can guess; the oldest go when there are too many bytes."""

    def __init__(self, *, seconds: float, most_bytes: int) -> None:
        self.kept = Kept[Input](seconds=seconds, most_bytes=most_bytes)

    def add(self, one: Input) -> str:
        """Keep it; its name."""
        return self.kept.add(one, nbytes=one.nbytes)

    def get(self, value: Any) -> Input | None:
        """What the page's picture field names; None where it is empty. Raises FieldError."""
        if not value:
            return None
        if not isinstance(value, Mapping) or "id" not in value:
            # The page puts there what its upload was answered.
            text = value.get("error") if isinstance(value, Mapping) else None
            raise FieldError("image", str(text or "the picture was not understood; choose it again")[:500])
        one = self.kept.get(str(value["id"]))
        if one is None:
            raise FieldError("image", "the picture to edit is not kept any more; choose it again")
        return one


def routes(inputs: Inputs, *, path: str) -> APIRouter:
    """The upload: POST `path`, a form with `image` and maybe `mask`; it answers with the name."""
    router = APIRouter()

    @router.post(path, include_in_schema=False)
    async def upload(request: Request) -> Response:
        server = server_of(request)
        async with read_form(request, most_files=2, most_fields=0) as form, server.decoding:
            images = await pictures(form, "image", settings=server.settings)
            masks = await pictures(form, "mask", settings=server.settings)
        if len(images) != 1 or len(masks) > 1:
            raise ApiError(400, "one image is taken, and one mask at most", code="invalid_value", param="image")
        mask = mask_of(masks[0], images[0]) if masks else None
        return JSONResponse({"id": inputs.add(Input(images[0].convert("RGB"), mask))})

    return router
