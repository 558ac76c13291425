"""The pipeline class that takes the inputs a job has: text alone, an image, a mask, a control image."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Container, Iterable, Mapping, Set
from itertools import takewhile
from numbers import Real
from typing import Any
from weakref import WeakKeyDictionary

from vivace.errors import InputError
from vivace.load import Source, pipeline_class

# Components that hold a control model -> the argument that scales it.
CONTROLS = {"controlnet": "controlnet_conditioning_scale", "adapter": "adapter_conditioning_scale"}
# Arguments of calls that need what a job has no field for, or make what it has no file for.
BEYOND = {
    "layers": "makes several pictures of one, too many for a file",
    "control_mask": "needs a mask of its control image",
}
WORDS = re.compile("[A-Z][a-z0-9]*")  # of a class name


def arguments(pipeline: type) -> dict[str, inspect.Parameter]:
    """The arguments of a pipeline class's call, without self."""
    return {name: one for name, one in _parameters(pipeline.__call__).items() if name != "self"}


def control_slot(pipeline: type) -> str | None:
    """The component that holds the class's control model, or None."""
    return next((slot for slot in CONTROLS if slot in _parameters(pipeline.__init__)), None)


def control_argument(pipeline: type) -> str | None:
    """The call's argument for the control image: `image` in the older ControlNet pipelines."""
    if "control_image" in arguments(pipeline):
        return "control_image"
    return "image" if control_slot(pipeline) else None


def encodes(pipeline: type) -> bool:
    """Whether the VAE encodes pictures that the class's call brings: control images of older ones it does not."""
    brought = {"image", "video", "control_image"} & arguments(pipeline).keys()
    return bool(brought - ({"image"} if control_argument(pipeline) == "image" else set()))


def size_arguments(size: tuple[int, int], accepted: Container[str]) -> dict[str, int]:
    """What tells a pipeline whose call accepts these arguments to make pictures of `size`, width and height."""
    # Kontext brings any size to an area of its own, and what it paints over to one of its favourite sizes.
    known = {"width": size[0], "height": size[1], "max_area": size[0] * size[1]}
    known |= {"_auto_resize": False} if "mask_image" in accepted else {}
    return {name: value for name, value in known.items() if name in accepted}


def takes_several(pipeline: type, source: Source) -> bool:
    """Whether the class makes one picture of several."""
    return source.family is not None and pipeline.__name__ in source.family.several


def goes_by_image(pipeline: type, source: Source) -> bool:
    """Whether what the class makes has the size of its image, which is brought to the size that is asked."""
    call = arguments(pipeline)
    return "strength" in call or (source.family is not None and "image" in call and "width" not in call)


def sizes_itself(pipeline: type, source: Source) -> bool:
    """Whether the class makes its pictures in a size of its own, by the shape of the image, whatever it is told."""
    return source.family is not None and pipeline.__name__ in source.family.own_size


def inputs_of(pipeline: type) -> frozenset[str]:
    """Which of image, mask, control and video the class takes."""
    call, control = arguments(pipeline), control_argument(pipeline)
    found = {"control"} if control else set()
    found |= {"image"} if "image" in call and control != "image" else set()
    found |= {"mask"} if "mask_image" in call else set()
    found |= {"video"} if {"video", "strength"} <= call.keys() else set()
    return frozenset(found)


def choose(source: Source, wanted: Set[str], *, control_class: str | None = None) -> type[Any]:
    """The diffusers pipeline class that runs `source` with exactly the `wanted` inputs.

    The model's own class where it fits; else, of those of its family that fit and need no component which the model
    lacks, the one whose name is most like its own class's. `control_class` is the class name of the control model at
    hand. Raises InputError.
    """
    import diffusers

    own = pipeline_class(source)
    for name, why in BEYOND.items():
        if name in arguments(own):
            raise InputError(f"{source.pipeline} {why}; call it in Python")
    lacking = sorted(_needed(own) - _at_hand(source, own))
    if lacking:
        raise InputError(f"{source.name} is not complete: model_index.json does not list {', '.join(lacking)}")
    held = _held_control(source, own)
    missing = [
        name
        for name in sorted(inputs_of(own) - wanted)
        if _required(own, name) or _reads_pictures(source) or (name == "control" and held)
    ]
    if missing:
        raise InputError(f"{source.pipeline} needs {_flags(missing)} too")
    if "control" in wanted:
        control_class = control_class or held
    names = source.family.pipelines if source.family else ()
    alike = sorted(names, key=lambda name: -_alike(source.pipeline, name))
    others = [getattr(diffusers, name) for name in alike if name != source.pipeline and hasattr(diffusers, name)]
    for pipeline in (own, *others):
        if inputs_of(pipeline) == wanted and _holds(pipeline, source, own, control_class):
            return pipeline
    if wanted <= inputs_of(own) and _holds(own, source, own, control_class):
        return own
    if "control" in wanted and control_class is None:
        raise InputError(f"{source.pipeline} needs --controlnet with --control-image")
    with_model = f" with a {control_class}" if control_class else ""
    raise InputError(
        f"{source.pipeline} cannot take {_flags(wanted)}{with_model}: diffusers has no pipeline of its family that does"
    )


def unsaid(pipeline: type[Any], call: Container[str]) -> list[str]:
    """The arguments that a class's call goes not without, and that `call` leaves out."""
    return [
        name
        for name, one in arguments(pipeline).items()
        if one.default is inspect.Parameter.empty and one.kind == one.POSITIONAL_OR_KEYWORD and name not in call
    ]


def no_step(pipeline: type[Any], call: Mapping[str, Any], *, prediction: str) -> str | None:
    """The strength and the steps of a call that leave nothing to denoise, in words; None where something is left.

    What the call does not say is the pipeline's own; those of flow models round such a strength up to a step.
    """
    accepted, names = arguments(pipeline), ("strength", "num_inference_steps")
    own = {name: accepted[name].default for name in names if name in accepted and prediction != "flow"}
    strength, steps = ({**own, **call}.get(name) for name in names)
    if "strength" not in accepted or not strength or not steps or int(steps * strength) >= 1:
        return None
    return f"strength {strength} of {steps} steps leaves none"


def unheard(pipeline: type[Any], call: Mapping[str, Any], *, silent: float) -> tuple[str, str] | None:
    """The argument of a call that would change nothing, and why in words: a negative prompt without guidance, or true
    guidance without a negative prompt. None where all is heard. `silent` is the guidance up to which there is none.

    What the call does not say is the pipeline's own.
    """
    accepted = arguments(pipeline)
    name = "true_cfg_scale" if "true_cfg_scale" in accepted else "guidance_scale"
    scale = call.get(name, accepted[name].default if name in accepted else None)
    guided = not isinstance(scale, Real) or float(scale) > silent
    if call.get("negative_prompt") and not guided:
        return "negative_prompt", f"a negative prompt needs {name} above {silent:g}, and that is {scale:g}"
    if "true_cfg_scale" in call and guided and not {"negative_prompt", "negative_prompt_embeds"} & call.keys():
        return "true_cfg_scale", "true_cfg_scale counts beside a negative prompt alone; give one, ' ' at least"
    return None


def _alike(own: str, name: str) -> int:
    """How many words two class names begin with in common: FluxKontextInpaintPipeline is for models of Kontext."""
    pairs = zip(WORDS.findall(own), WORDS.findall(name), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _flags(names: Iterable[str]) -> str:
    return " and ".join(f"--{'control-image' if name == 'control' else name}" for name in sorted(names))


def _held_control(source: Source, own: type[Any]) -> str | None:
    """The class name of the control model that a model has of its own."""
    part = source.index.get(control_slot(own) or "")
    return part[1] if isinstance(part, list) and len(part) == 2 else None


def _reads_pictures(source: Source) -> bool:
    """Whether a denoiser has channels for pictures beside the latents: no loop that leaves them empty can run it.

    Such a one reads more channels for each that it writes than its class does by itself.
    """
    import diffusers

    if source.family is None:
        return False
    by_itself = _parameters(getattr(diffusers, source.family.denoiser_class).__init__)

    def ratio(config: Mapping[str, Any]) -> float:
        read, written = (
            config.get(name, by_itself[name].default if name in by_itself else None)
            for name in ("in_channels", "out_channels")
        )
        return read / (written or read)

    return ratio(source.denoiser) > ratio({})


def _required(pipeline: type, name: str) -> bool:
    argument = arguments(pipeline).get({"mask": "mask_image"}.get(name, name))
    return argument is not None and argument.default is inspect.Parameter.empty


def _holds(pipeline: type[Any], source: Source, own: type[Any], control_class: str | None) -> bool:
    """Whether the model and the control model at hand make up all that the class is built from."""
    said = source.family.only_with.get(pipeline.__name__) if source.family else None
    if pipeline is not own and said and not source.index.get(said):
        return False
    slot = control_slot(pipeline)
    built, ours = _parameters(pipeline.__init__), _parameters(own.__init__)
    encoders = [name for name in built.keys() & ours.keys() if name.startswith("text_encoder")]
    # FLUX.2 dev and klein read prompts with different models.
    if any(built[name].annotation != ours[name].annotation for name in encoders):
        return False
    if (slot is not None) != (control_class is not None):
        return False
    if slot and control_class and control_class not in str(built[slot].annotation):
        return False
    return _needed(pipeline) - {slot} <= _at_hand(source, own)


def _at_hand(source: Source, own: type[Any]) -> set[str]:
    """The components of a model; those that its class can do without count, as absent."""
    return (set(source.index) or set(_parameters(own.__init__))) | set(own._optional_components)


def _needed(pipeline: type[Any]) -> frozenset[str]:
    """The components that the class is not built without."""
    built = _parameters(pipeline.__init__)
    return frozenset(name for name, one in built.items() if one.default is inspect.Parameter.empty) - {"self"}


# A server asks for each request, and to read a signature takes a tenth of a millisecond.
_PARAMETERS: WeakKeyDictionary[Callable[..., Any], Mapping[str, inspect.Parameter]] = WeakKeyDictionary()


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    if function not in _PARAMETERS:
        _PARAMETERS[function] = inspect.signature(function).parameters
    return _PARAMETERS[function]
