"""The LoRAs of one model: registered by alias, put onto its layers as requests want them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from vivace.checkpoint import header
from vivace.errors import InputError, first_line
from vivace.lora.files import load, read
from vivace.serve.failures import FieldError, Unavailable
from vivace.serve.worker import fatal, out_of_memory

logger = logging.getLogger(__name__)

Chosen = tuple[tuple[str, float], ...]
"""Aliases with their weights."""


class Loras:
    """The LoRAs that a model's requests may name, and which of them are on its layers.

    Raises InputError for a file that is none, and for a pipeline that wears LoRAs already.
    """

    def __init__(self, files: Mapping[str, Path], *, pipe: Any) -> None:
        self.files = files
        self._on: Chosen | None = ()  # None: not known
        for path in files.values():
            header(Path(path))
        own = pipe.get_list_adapters() if files and hasattr(pipe, "get_list_adapters") else {}
        if names := sorted({name for several in own.values() for name in several}):
            raise InputError(
                f"the pipeline has LoRAs of its own ({', '.join(names)}), which those of a request would displace; "
                "fuse them into it, or unload them and register their files too"
            )

    def put(self, pipe: Any, chosen: Chosen, *, model: str) -> None:
        """Have exactly these on the layers of `pipe`. Raises FieldError for one that does not fit, Unavailable for one
        whose file is not what it was at the start."""
        if self._on == chosen:
            return
        if not hasattr(pipe, "load_lora_weights"):
            raise FieldError("lora", f"{type(pipe).__name__} takes no LoRA")
        self._on = None
        pipe.unload_lora_weights()
        # Not by their aliases: PEFT makes attributes of the names, which have no dots and are not such as "half".
        adapters = [f"lora_{index}" for index, _ in enumerate(chosen)]
        for adapter, (alias, _) in zip(adapters, chosen, strict=True):
            weights = self._read(pipe, alias)
            try:
                load(pipe, weights, adapter_name=adapter)
            except Exception as error:  # diffusers and peft raise what the file's layout leads them to
                pipe.unload_lora_weights()
                if out_of_memory(error) or fatal(error):
                    raise
                logger.warning("LoRA %s does not fit %s: %s", alias, model, first_line(error))
                raise FieldError("lora", f"LoRA {alias!r} does not fit this model") from None
        if adapters:
            pipe.set_adapters(adapters, adapter_weights=[weight for _, weight in chosen])
        self._on = chosen

    def take_off(self, pipe: Any) -> None:
        """Give the pipeline back without them."""
        if self._on != ():
            pipe.unload_lora_weights()

    def forget(self) -> None:
        """The pipeline is gone."""
        self._on = ()

    def _read(self, pipe: Any, alias: str) -> dict[str, torch.Tensor]:
        try:
            return read(pipe, Path(self.files[alias]))
        except (OSError, SafetensorError) as error:
            logger.error("LoRA %s cannot be read: %s", alias, first_line(error))
            raise Unavailable(f"the LoRA {alias} cannot be read") from None
