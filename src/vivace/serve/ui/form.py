"""What the page's fields hold, and the request that they make: through the API's own schema and limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vivace.cache import POLICIES
from vivace.config import PRESETS
from vivace.generation.generate import CALL
from vivace.inputs import unheard
from vivace.load import pipeline_class
from vivace.serve.http.schema import EditOrder, read
from vivace.serve.http.server import Server
from vivace.serve.model import Model
from vivace.serve.request import Request
from vivace.serve.ui.inputs import Inputs

NO_CACHE = "none"
PREVIEWS = 10  # of a picture, at most
STEPS = 28  # where nothing is known of a model
SHAPES = ((1, 1), (4, 3), (3, 4), (16, 9), (9, 16))


@dataclass(frozen=True, kw_only=True)
class Form:
    """The fields, in the page's order. Their values come from a browser: anything may be in them."""

    prompt: Any
    negative: Any
    model: Any
    size: Any
    steps: Any
    guidance: Any
    seed: Any
    preset: Any
    cache: Any
    lora: Any  # pairs of alias and weight
    strength: Any
    edit: Any

    def request(self, server: Server, inputs: Inputs) -> Request:
        """The request of one picture. Raises ApiError, FieldError or InputError."""
        alias = server.alias(str(self.model) if self.model else None, media="image")
        model = server.engine.models[alias]
        # The browser keeps a picture that was chosen for another model.
        edited = inputs.get(self.edit) if takes(model, "image") else None
        fields = {
            "prompt": self.prompt,
            "negative_prompt": self.negative or None if takes(model, "negative") else None,
            "model": alias,
            # An edit keeps its picture's shape.
            "size": _size(self.size) if edited is None else None,
            "steps": self.steps,
            "guidance_scale": self.guidance if takes(model, "guidance") else None,
            "seed": str(self.seed).strip() or None if self.seed is not None else None,
            "quality": self.preset or "auto",
            "cache": self.cache or None,
            "lora": dict(_pairs(self.lora)),
            "strength": self.strength if edited is not None and takes(model, "strength") else None,
        }
        order: EditOrder = read(EditOrder, fields, server.settings)
        return order.request(
            model=alias,
            quality=order.preset,
            strength=order.strength,
            images=() if edited is None else (edited.image,),
            mask=None if edited is None else edited.mask,
            queue_seconds=server.settings.queue_seconds,
            run_seconds=server.settings.run_seconds,
            previews=PREVIEWS,
        )

    def plain(self, *, seed: int) -> dict[str, Any]:
        """The fields again, for `restored`, with the seed that was drawn; of a picture to edit only whether it was."""
        return vars(replace(self, seed=str(seed), edit=bool(self.edit))).copy()


def restored(found: Any, server: Server) -> dict[str, Any]:
    """The fields of an earlier picture that can be set again: of a browser's memory, so of anything."""
    if not isinstance(found, Mapping):
        return {}
    known = {name: found[name] for name in Form.__dataclass_fields__ if name in found and name != "edit"}
    models = {alias for alias, model in server.engine.models.items() if model.media == "image"}
    allowed = {"model": models, "preset": {*PRESETS}, "cache": {NO_CACHE, *POLICIES}}
    known = {name: value for name, value in known.items() if name not in allowed or value in [*allowed[name]]}
    loras = server.engine.model(known.get("model")).spec.loras
    if "lora" in known:
        known["lora"] = [[alias, weight] for alias, weight in _pairs(known["lora"]) if alias in loras]
    return known


def takes(model: Model, what: str) -> bool:
    """Whether a model takes a negative prompt, an image, ...; of one without a family it is found out by trying."""
    family = model.source.family
    if family is None or what not in family.takes:
        return family is None
    own = {CALL[name]: value for name, value in model.source.defaults.items()} | {"negative_prompt": " "}
    # Which guidance there is, is the model's own: the page has no field for true guidance, and a student has none.
    return what != "negative" or not unheard(pipeline_class(model.source), own, silent=family.silent)


def sizes(model: Model) -> list[str]:
    """Sizes to choose from: the area that a model was made for, in several shapes."""
    width, height = model.source.size or (1024, 1024)
    multiple = model.source.multiple if model.source.family else 16
    found = [f"{width}x{height}"] if model.source.size else []
    for across, down in SHAPES:
        scale = (width * height / (across * down)) ** 0.5
        scale = min(scale, model.source.longest / max(across, down)) if model.source.longest else scale
        sides = [max(multiple, round(part * scale / multiple) * multiple) for part in (across, down)]
        found.append(f"{sides[0]}x{sides[1]}")
    return list(dict.fromkeys(found))


def defaults(model: Model) -> dict[str, Any]:
    """A model's own values of the fields."""
    own = model.source.defaults
    return {
        "size": sizes(model)[0],
        "steps": own.get("steps", STEPS),
        "guidance": own.get("guidance", 5.0),
        "preset": model.spec.preset if model.spec.preset in PRESETS else next(iter(PRESETS)),
        "lora": [],
    }


def _pairs(value: Any) -> list[tuple[str, Any]]:
    """Aliases with their weights, of what a browser sent; what is no pair is none."""
    found = value if isinstance(value, list) else []
    return [(one[0], one[1]) for one in found if isinstance(one, list) and len(one) == 2 and isinstance(one[0], str)]


def _size(text: Any) -> Any:
    return text.lower().replace(" ", "").replace("×", "x") if isinstance(text, str) else text or None
