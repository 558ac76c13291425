"""From a request to a call of a pipeline: which class, which arguments, and whether the model takes them at all."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vivace import inputs
from vivace.errors import InputError
from vivace.generation.conditioning import ROUND_TO
from vivace.generation.generate import CALL
from vivace.generation.job import frames_problem, size_problem
from vivace.load import Source
from vivace.scheduler import scheduler_class
from vivace.serve.failures import FieldError
from vivace.serve.request import Request

if TYPE_CHECKING:
    from PIL import Image

# Field of a request -> what a Family must list in `takes` for it.
NEEDS = {
    "prompt": "prompt",
    "negative": "negative",
    "guidance": "guidance",
    "true_cfg": "true_cfg",
    "images": "image",
    "mask": "mask",
    "strength": "strength",
}
_FIELD = {argument: name for name, argument in CALL.items()}


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A request that its model can do."""

    request: Request
    pipeline: type[Any]  # the class that takes its inputs
    call: dict[str, Any]  # the arguments of its call, less the generator
    size: tuple[int, int] | None  # None: the pipeline's own choice

    @property
    def pixels(self) -> int | None:
        """Of all frames, also where the pipeline's own defaults decide; None where these depend on its weights."""
        accepted = inputs.arguments(self.pipeline)
        sides = [self.call.get(name, _default(accepted, name)) for name in ("width", "height")]
        frames = self.call.get("num_frames", _default(accepted, "num_frames")) or 1
        return sides[0] * sides[1] * frames if all(isinstance(side, int) for side in sides) else None


def _chosen(source: Source, names: frozenset[str]) -> type[Any]:
    """The pipeline class that takes just these. Raises FieldError or InputError, without the command line's flags."""
    try:
        return inputs.choose(source, names)
    except InputError as error:
        said = str(error).replace("--", "")
        raise (FieldError(min(names), said) if names else InputError(said)) from None


def _default(accepted: dict[str, inspect.Parameter], name: str) -> Any:
    default = accepted[name].default if name in accepted else None
    return None if default is inspect.Parameter.empty else default


def prepare(request: Request, source: Source) -> Prepared:
    """Check a request against its model, and translate it. Raises FieldError or InputError; needs no weights."""
    check(request, source)
    wanted = {"image": request.images, "mask": request.mask, "control": request.arguments.get("control_image")}
    own = inputs.inputs_of(_class(source))
    # A pipeline that was loaded for control images takes them as an argument.
    names = frozenset(name for name, value in wanted.items() if value is not None and value != ())
    pipeline = _class(source) if "control" in own else _chosen(source, names - {"control"})
    accepted = inputs.arguments(pipeline)
    call = {CALL[name]: value for name, value in source.defaults.items() if CALL.get(name) in accepted}
    for name, argument in CALL.items():
        value = getattr(request, name)
        if value is not None and argument not in accepted:
            raise FieldError(name, f"{pipeline.__name__} does not take {name}")
        if value is not None:
            call[argument] = value
    if request.prompt and "prompt" in accepted:
        call["prompt"] = request.prompt
    if request.fps is not None and "fps" in accepted:
        call["fps"] = request.fps
    if request.size is not None and inputs.sizes_itself(pipeline, source):
        raise FieldError("size", f"{pipeline.__name__} does not take size: it goes by the shape of its image")
    size = request.size or (fitting(request.images[0].size, source) if request.images else source.size)
    if size is not None:
        call |= inputs.size_arguments(size, accepted)
    call |= _pictures(request, size=size, pipeline=pipeline, source=source)
    unknown = sorted(request.arguments.keys() - accepted.keys())
    if unknown:
        raise FieldError("arguments", f"{pipeline.__name__} has no argument {unknown[0]}")
    if request.scheduler is not None:
        try:
            scheduler_class(request.scheduler, prediction=source.prediction)
        except InputError as error:
            raise FieldError("scheduler", str(error)) from None
    call |= request.arguments
    if none := inputs.no_step(pipeline, call, prediction=source.prediction):
        raise FieldError("strength", f"{none}; raise one of them")
    if source.family and (unheard := inputs.unheard(pipeline, call, silent=source.family.silent)):
        raise FieldError(_FIELD[unheard[0]], unheard[1])
    return Prepared(request=request, pipeline=pipeline, call=call, size=size)


def fitted(request: Request, source: Source) -> Request:
    """The same request, its pictures of the size that is made. For large ones it takes a while: not for an event loop,
    and not again for each of several pictures. Raises FieldError or InputError as `prepare` does.
    """
    if not request.images:
        return request
    made = prepare(request, source)
    if inputs.sizes_itself(made.pipeline, source) or not inputs.goes_by_image(made.pipeline, source):
        return request
    found = made.call["image"]
    images = tuple(found) if isinstance(found, list) else (found,)
    return replace(request, size=made.size, images=images, mask=made.call.get("mask_image"))


def check(request: Request, source: Source) -> None:
    """Check a request against the facts of its model's family. Raises FieldError that names what is allowed."""
    family = source.family
    if family is None:
        return
    given = [name for name in NEEDS if getattr(request, name) not in (None, (), "")]
    refused = [name for name in given if NEEDS[name] not in family.takes]
    refused += [name for name in ("frames", "fps") if getattr(request, name) and family.media != "video"]
    if refused:
        raise FieldError(
            refused[0], f"{family.title} does not take {refused[0]}; it takes {', '.join(sorted(family.takes))}"
        )
    if "prompt" in family.takes and not request.prompt.strip() and "prompt_embeds" not in request.arguments:
        raise FieldError("prompt", "the prompt is empty; say what to draw")
    if request.size is not None and (problem := size_problem(request.size, source)):
        raise FieldError("size", f"size {problem}")
    if request.frames is not None and (problem := frames_problem(request.frames, source)):
        raise FieldError("frames", f"frames {problem}")


def fitting(size: tuple[int, int], source: Source) -> tuple[int, int]:
    """A picture's size in multiples that the model can make, shrunk to the area it was made for."""
    from vivace.generation import conditioning

    return conditioning.fitting(size, source) if source.family else (_down(size[0]), _down(size[1]))


def _down(side: int) -> int:
    return max(ROUND_TO, side // ROUND_TO * ROUND_TO)


def _class(source: Source) -> type[Any]:
    import diffusers

    found = getattr(diffusers, source.pipeline, None)
    if found is None:
        raise InputError(f"{source.name} is a {source.pipeline}, which this diffusers ({diffusers.__version__}) lacks")
    return found


def _pictures(request: Request, *, size: tuple[int, int] | None, pipeline: type[Any], source: Source) -> dict[str, Any]:
    """The input pictures, brought to the size that is made where they are painted over."""
    if not request.images:
        return {}
    if len(request.images) > 1 and not inputs.takes_several(pipeline, source):
        raise FieldError("image", f"this model takes one image; {len(request.images)} were given")

    def placed(image: Image.Image) -> Image.Image:
        return image.resize(size) if size and inputs.goes_by_image(pipeline, source) else image

    # Converted to what it is already, one would be copied, for each picture that is made of it.
    plain = [image if image.mode == "RGB" else image.convert("RGB") for image in request.images]
    images = [placed(image) for image in plain]
    found: dict[str, Any] = {"image": images if len(images) > 1 else images[0]}
    if request.mask is not None:
        found["mask_image"] = placed(request.mask.convert("L"))
    return found
