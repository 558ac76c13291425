"""What a job adds to its prompt: input pictures, a control model, LoRAs, an IP-Adapter, another scheduler."""

from __future__ import annotations

import inspect
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vivace import hub
from vivace.errors import InputError, first_line
from vivace.generation import picture
from vivace.inputs import (
    CONTROLS,
    arguments,
    control_argument,
    control_slot,
    goes_by_image,
    size_arguments,
    sizes_itself,
    takes_several,
)
from vivace.load import HUB_ID, Source

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from PIL import Image

    from vivace.generation.job import Job

ROUND_TO = 8  # pixels, where no family says


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """A job's input pictures, read."""

    images: tuple[Image.Image, ...] = ()
    mask: Image.Image | None = None
    control: Image.Image | None = None
    reference: Image.Image | None = None  # the IP-Adapter's

    @property
    def wanted(self) -> frozenset[str]:
        """Which inputs the pipeline class has to take for them."""
        given = {"image": self.images, "mask": self.mask, "control": self.control}
        return frozenset(name for name, value in given.items() if value)


def read_pictures(job: Job) -> Pictures:
    """Read a job's pictures; with an IP-Adapter the last image is its reference. Raises InputError."""
    images = [picture.read(path) for path in job.images]
    return Pictures(
        reference=images.pop() if job.ip_adapter else None,
        images=tuple(images),
        mask=picture.read(job.mask, mode="L") if job.mask else None,
        control=picture.read(job.control_image) if job.control_image else None,
    )


def picture_arguments(pictures: Pictures, pipeline: type, *, job: Job, source: Source) -> dict[str, Any]:
    """The call's arguments for the pictures and the size. Raises InputError for what the class does not take of them.

    Where an image is painted over or steers each place (control), every picture is brought to the size that is made;
    most editing pipelines see their images as they are.
    """
    if job.size and sizes_itself(pipeline, source):
        raise InputError(f"{pipeline.__name__} does not take --size: it goes by the shape of its --image")
    call = arguments(pipeline)
    found: dict[str, Any] = {}
    places = [*(pictures.images if goes_by_image(pipeline, source) else ()), *filter(None, [pictures.control])]
    squares = _squares(pipeline, job=job, source=source)
    size = job.size or (fitting(places[0].size, source, squares=squares) if places else None)
    if size and any(side % squares for side in size):
        nearest = "x".join(str(max(squares, round(side / squares) * squares)) for side in size)
        made = f"{size[0]}x{size[1]} cannot be made with this T2I-Adapter"
        raise InputError(f"--size {made}: it needs multiples of {squares}; the nearest is {nearest}")
    if size:
        found |= size_arguments(size, call)

    def placed(image: Image.Image) -> Image.Image:
        return image.resize(size) if places and size else image

    if pictures.images:
        if len(pictures.images) > 1 and not takes_several(pipeline, source):
            raise InputError(f"{pipeline.__name__} takes one --image; {len(pictures.images)} were given")
        images = [placed(image) for image in pictures.images]
        found["image"] = images if len(images) > 1 else images[0]
    if pictures.mask:
        found["mask_image"] = placed(pictures.mask)
    if pictures.control:
        found[control_argument(pipeline) or "control_image"] = placed(pictures.control)
        slot = control_slot(pipeline)
        if job.controlnet_scale is not None:
            if slot is None:
                raise InputError(f"{pipeline.__name__} does not take --controlnet-scale: it has no control model")
            found[CONTROLS[slot]] = job.controlnet_scale
    if pictures.reference:
        found["ip_adapter_image"] = pictures.reference
    return found


def fitting(size: tuple[int, int], source: Source, *, squares: int = 1) -> tuple[int, int]:
    """A picture's size, shrunk to the area the model was made for and what it can make, in multiples of its VAE.

    `squares`: what it has to be multiples of besides.
    """
    multiple = math.lcm(source.multiple if source.family else ROUND_TO, squares)
    native = source.size
    scale = min(1.0, math.sqrt(native[0] * native[1] / (size[0] * size[1]))) if native else 1.0
    scale = min(scale, source.longest / max(size)) if source.longest else scale
    width, height = (max(multiple, round(side * scale / multiple) * multiple) for side in size)
    return width, height


def control_class(job: Job) -> str | None:
    """The class name of the job's control model, from its config.json alone. Raises InputError."""
    if job.controlnet is None:
        return None
    name = _control_config(job).get("_class_name")
    import diffusers

    if not isinstance(name, str) or not hasattr(diffusers, name):
        raise InputError(f"--controlnet {job.controlnet} holds a {name}, which diffusers {diffusers.__version__} lacks")
    return name


def _control_config(job: Job) -> dict[str, Any]:
    assert job.controlnet is not None
    config = Path(job.controlnet).expanduser() / "config.json"
    if not os.path.isfile(config):
        if os.path.exists(job.controlnet) or not HUB_ID.fullmatch(job.controlnet):
            raise InputError(f"--controlnet {job.controlnet} is not a ControlNet's folder: it has no config.json")
        try:
            config = hub.fetch(job.controlnet, "config.json")
        except InputError as error:
            raise InputError(f"no control model {job.controlnet} here, and none from the hub ({error})") from error
    return _facts(config)


def _facts(config: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(config.read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{config} cannot be read; give a ControlNet's folder") from error


def _squares(pipeline: type, *, job: Job, source: Source) -> int:
    """The side in pixels of the squares by which a T2I-Adapter takes its picture; 1 for any other control model."""
    if control_slot(pipeline) != "adapter":
        return 1
    own = source.path and source.path / "adapter" / "config.json"
    found = _control_config(job) if job.controlnet else _facts(own) if own and own.is_file() else {}
    return int(found.get("downscale_factor", 8))


def load_control(job: Job, pipeline: type, *, name: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """The job's control model, as the component the pipeline class wants it as. Raises InputError."""
    slot = control_slot(pipeline)
    if name is None or slot is None:
        return {}
    import diffusers

    try:
        model = getattr(diffusers, name).from_pretrained(job.controlnet, torch_dtype=dtype, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise InputError(f"--controlnet {job.controlnet} cannot be loaded: {first_line(error)}") from error
    return {slot: model}


def check_adapters(job: Job, pipeline: type) -> None:
    """Check that the pipeline class can take the job's LoRAs and IP-Adapter. Raises InputError."""
    if job.loras and not hasattr(pipeline, "load_lora_weights"):
        raise InputError(f"{pipeline.__name__} takes no --lora")
    if "ControlNetUnion" in pipeline.__name__ and "control_mode" not in job.call_kwargs:
        raise InputError(
            f"{pipeline.__name__} needs the kind of its --control-image, by number; "
            "give it as --call-kwargs '{\"control_mode\": [3]}'"
        )
    if job.ip_adapter and not (hasattr(pipeline, "load_ip_adapter") and "ip_adapter_image" in arguments(pipeline)):
        raise InputError(f"{pipeline.__name__} takes no --ip-adapter")


def adapt(pipe: DiffusionPipeline, job: Job) -> None:
    """Load the job's LoRAs and IP-Adapter into a loaded pipeline. Raises InputError where one does not fit it."""
    from vivace.accelerate import accelerate
    from vivace.config import Config
    from vivace.lora import files

    loading: Any = pipe
    if job.ip_adapter:
        _load_ip_adapter(loading, job.ip_adapter)
    if job.loras and files.in_few_bits(pipe):
        accelerate(pipe, job.config or Config())
    weights = {f"lora_{index}": one.weight for index, one in enumerate(job.loras)}
    for name, one in zip(weights, job.loras, strict=True):
        files.load(pipe, one.path, adapter_name=name)
    if weights:
        loading.set_adapters(list(weights), adapter_weights=list(weights.values()))


def _load_ip_adapter(pipe: Any, path: Path) -> None:
    folder = path.parent / "image_encoder"
    if getattr(pipe, "image_encoder", None) is None and not folder.is_dir():
        raise InputError(f"--ip-adapter {path} needs its image encoder: put it into {folder}")
    # As a whole path: beside the file alone some classes look for it in the working directory.
    options = {"image_encoder_folder": str(folder.resolve()) if folder.is_dir() else None}
    if "image_encoder_pretrained_model_name_or_path" in inspect.signature(pipe.load_ip_adapter).parameters:
        options = {"image_encoder_pretrained_model_name_or_path": str(folder)} if folder.is_dir() else {}
    try:
        pipe.load_ip_adapter(str(path.parent), subfolder="", weight_name=path.name, local_files_only=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"--ip-adapter {path} does not fit {type(pipe).__name__}: {first_line(error)}") from error
