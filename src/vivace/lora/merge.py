"""`merge`: a model with LoRAs added into its weights for good, written as a pipeline folder."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from vivace import checkpoint
from vivace.errors import InputError, first_line
from vivace.load import OWN, Source, find, load_source
from vivace.lora import files
from vivace.lora.adapters import Adapters
from vivace.lora.merged import Merged

if TYPE_CHECKING:
    from vivace.generation.job import Lora

STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def merge(
    model: str | os.PathLike[str],
    loras: Sequence[Lora],
    *,
    output: str | os.PathLike[str],
    dtype: str | torch.dtype | None = None,
    variant: str | None = None,
) -> Path:
    """Write `model` with `loras` added, each times its weight, to the folder `output`, which must not exist.

    The sums are taken in fp32 and stored as `dtype`, which defaults to what the model's denoiser is stored in. Text
    encoders' LoRAs are merged too. The folder appears complete or not at all. Raises InputError before anything is
    written.
    """
    folder = Path(output).expanduser()
    if folder.exists():
        raise InputError(f"{folder} exists, and is left alone; name a new folder")
    if not loras:
        raise InputError("no LoRA to merge; name at least one .safetensors file")
    for one in loras:
        checkpoint.header(one.path)
    source = find(model, variant=variant)
    part = folder.with_name(f"{folder.name}.part{os.getpid()}")
    try:
        part.mkdir(parents=True)
        pipe = _merged(source, loras, dtype=dtype or _stored(source), variant=variant)
        pipe.save_pretrained(part, safe_serialization=True)
        if source.path is not None and (source.path / OWN).is_file():
            shutil.copy(source.path / OWN, part / OWN)
        part.rename(folder)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be written: {first_line(error)}; name a folder elsewhere") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _merged(source: Source, loras: Sequence[Lora], *, dtype: str | torch.dtype, variant: str | None) -> Any:
    """The pipeline with the sums in plain modules."""
    pipe: Any = load_source(source, dtype=dtype, device="cpu", variant=variant)
    names = [f"lora_{index}" for index in range(len(loras))]
    for name, one in zip(names, loras, strict=True):
        files.load(pipe, one.path, adapter_name=name)
    pipe.set_adapters(names, [one.weight for one in loras])
    _settle(pipe)
    return pipe


def _settle(pipe: Any) -> None:
    """Leave plain modules with every active adapter in their weights."""
    from diffusers.utils import recurse_remove_peft_layers

    for slot in dict.fromkeys((*pipe._lora_loadable_modules, "transformer_2")):
        component: Any = getattr(pipe, slot, None)
        if not getattr(component, "peft_config", None):
            continue
        adapters = Adapters(component, effect=Merged())
        adapters.lift()
        adapters.settle()
        if adapters.refused:
            # Of other kinds PEFT itself knows the sum.
            pipe.fuse_lora(components=[slot])
            recurse_remove_peft_layers(component)
        del component.peft_config
        component._hf_peft_config_loaded = False


def _stored(source: Source) -> torch.dtype:
    """What most tensors of a model's denoiser are stored in; float32 where that cannot be told."""
    path = source.path
    if path is None:
        return torch.float32
    rooms = [path / name for name in source.family.denoisers] if source.family else [path / "transformer"]
    files = [path] if path.is_file() else [file for room in rooms for file in sorted(room.glob("*.safetensors"))]
    counts = Counter(tensor.dtype for file in files[:1] for tensor in checkpoint.header(file).values())
    return STORED.get(counts.most_common(1)[0][0], torch.float32) if counts else torch.float32
