"""One model behind an alias: loaded when first used, in one mode (preset and LoRAs) at a time, parked or unloaded when
others need the room."""

from __future__ import annotations

import gc
import inspect
import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vivace import few_step
from vivace.accelerate import accelerate, acceleration_of, restore
from vivace.cache import spell
from vivace.config import PRESETS, Config, preset_name, resolve
from vivace.errors import InputError, first_line
from vivace.family import known_family
from vivace.lane import Lane
from vivace.load import Source, find, load_source, resolve_device
from vivace.lora.files import in_few_bits
from vivace.passes.target import device_of, hooks_of
from vivace.serve.call import Axes
from vivace.serve.failures import FieldError, OutOfMemory, Unavailable
from vivace.serve.layout import Layouts
from vivace.serve.loras import Chosen, Loras
from vivace.serve.request import Request
from vivace.serve.sketch import Sketch
from vivace.serve.worker import fatal, out_of_memory

logger = logging.getLogger(__name__)

BUILDING = threading.Lock()
"""Held while modules are made, of any model: for as long as diffusers, transformers and peft make some, they change how
all of torch's modules take their parameters. Two at a time break each other, and all that come after."""
LOOK = 0.05  # seconds between two looks at whether who waits for that still wants to


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What an alias stands for."""

    source: Any = "builtin"  # as `vivace.load` takes it, or a pipeline
    preset: str | Config | None = "exact"  # for requests that ask for no quality; None: the pipeline as it is
    loras: Mapping[str, Path] = field(default_factory=dict)  # alias -> file
    dtype: str | None = None
    device: str | None = None
    few_step: bool = False  # with the model's few-step student


@dataclass(frozen=True)
class Mode:
    """What is common to all requests that run on a model at the same time."""

    preset: Config | None  # None: as it is
    loras: Chosen = ()
    alone: Hashable = None  # set: nobody else runs


class Model:
    """A model and who uses it. `reserve` and `leave` go in pairs; after `ready`, `pipe` is there in between."""

    def __init__(self, alias: str, spec: Spec) -> None:
        self.alias = alias
        self.spec = spec
        self.source = _source(alias, spec)
        self.pipe: Any = None if isinstance(spec.source, str | Path) else spec.source
        self.lock = threading.RLock()  # for its tokenizers
        self.used = time.monotonic()
        self.active = 0
        self.closing = False  # whether it takes nobody new, because others wait for its room
        self.load_seconds: float | None = None
        self.broken = False  # whether its weights could not be loaded the last time
        self.sketch = Sketch()
        self.layouts = Layouts()
        self._gate = threading.Lock()  # held for moments
        self._setup = threading.Lock()  # held while it loads
        self._mode: Mode | None = None  # of those who use it now
        self._moving = threading.Lock()  # held while its weights are on their way to the host
        self._applied = Mode(preset=None)
        self._home: torch.device | None = None  # of a parked one: where it computes
        self._inputs_on: torch.device | None = None  # once it was asked for
        self._given = _config(self.pipe)  # how it was accelerated before it was served
        self._classes: dict[type, Any] = {}  # the same components as another pipeline class
        self._loras = Loras(spec.loras, pipe=self.pipe)
        if spec.preset is not None:
            resolve(spec.preset)  # said now, not by the first request

    def mode_of(self, request: Request) -> Mode:
        """The mode a request needs. Raises FieldError for an unknown preset or LoRA, and for another scheduler than a
        few-step student's."""
        if self.spec.few_step and request.scheduler is not None:
            raise FieldError("scheduler", "a few-step student brings its own scheduler; leave this one out")
        for name in request.lora:
            if name not in self.spec.loras:
                known = ", ".join(self.spec.loras) or "none"
                raise FieldError("lora", f"no LoRA {name!r:.100} is registered for {self.alias} (registered: {known})")
        if request.quality is not None and request.quality not in PRESETS:
            raise FieldError("quality", f"no preset {request.quality!r}; there are {', '.join(PRESETS)}")
        preset: Any = request.quality or self.spec.preset
        if request.cache is not None:
            try:
                preset = resolve(preset or self._given, cache=None if request.cache == "none" else request.cache)
            except InputError as error:
                raise FieldError("cache", str(error)) from None
        # The same by another spelling, such as exact without a cache, is the same mode.
        config = None if preset is None else resolve(preset)
        return Mode(preset=config, loras=tuple(sorted(request.lora.items())))

    @property
    def denoisers(self) -> dict[str, torch.nn.Module]:
        """By what the pipeline calls them."""
        names = self.source.family.denoisers if self.source.family else ("transformer", "transformer_2", "unet")
        return {name: part for name in names if isinstance(part := getattr(self.pipe, name, None), torch.nn.Module)}

    @property
    def media(self) -> str:
        """image or video."""
        return self.source.family.media if self.source.family else "image"

    @property
    def preset(self) -> str:
        """The preset in force, by name."""
        acceleration = acceleration_of(self.pipe) if self.pipe is not None else None
        return preset_name(acceleration.target.config) if acceleration else "stock"

    @property
    def cache(self) -> str | None:
        """The step cache in force, as it is spelled."""
        acceleration = acceleration_of(self.pipe) if self.pipe is not None else None
        policy = acceleration.target.config.cache if acceleration else None
        return None if policy is None else spell(policy)

    @property
    def nbytes(self) -> int:
        """Of its weights on the device; 0 while it is not loaded, or parked."""
        return 0 if self._home else self._bytes

    @property
    def parked_bytes(self) -> int:
        """Of its weights in host memory, while it is parked."""
        return self._bytes if self._home else 0

    @property
    def _bytes(self) -> int:
        modules = [part for part in self._components if isinstance(part, torch.nn.Module)]
        # Packed weights of few bits are buffers.
        return sum(t.nbytes for one in modules for held in (one.parameters(), one.buffers()) for t in held)

    @property
    def _components(self) -> list[Any]:
        pipe = self.pipe  # once: another thread may drop it meanwhile
        return [] if pipe is None else list(pipe.components.values())

    @property
    def expected_bytes(self) -> int:
        """What it takes once it is back; of one that has to be loaded, about as much as its files."""
        path = self.source.path
        if self._home:
            return self._bytes
        if path is None or self.pipe is not None:
            return 0
        files = [path] if path.is_file() else path.rglob("*.safetensors")
        return sum(file.stat().st_size for file in files)

    def axes(self, *, padded: bool) -> Axes:
        """How its denoisers' calls are joined; with `padded` also those whose texts are not of one length."""
        family = self.source.family
        if family is None:
            return Axes()
        return Axes(shared=family.shared, listed=family.listed, padded=family.padded if padded else {})

    def reserve(self, mode: Mode) -> bool:
        """Whether a request of that mode may begin now; if so, it counts as begun until `leave`."""
        with self._gate:
            alike = self._mode == mode and mode.alone is None
            if self.closing or self._moving.locked() or (self.active and not alike):
                return False
            self._mode, self.active = mode, self.active + 1
            return True

    def is_in(self, mode: Mode) -> bool:
        """Whether it is loaded, and in that mode."""
        return self._applied == mode and self.pipe is not None and not self._home

    def ready(
        self,
        mode: Mode,
        *,
        room: Callable[[], AbstractContextManager[None]] = nullcontext,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Load the model and bring it into the reserved mode, unless it is. Raises InputError.

        Within `room()` weights are loaded. While others change theirs `check` is called, and may raise.
        """
        with _taken(self._setup, check):
            if self.pipe is None or self._home:
                with room(), _taken(BUILDING, check):
                    self._load()
            if self._applied != mode:
                with _taken(BUILDING, check):
                    self._apply(mode)
        self.used = time.monotonic()

    def leave(self) -> None:
        """End what `reserve` began."""
        with self._gate:
            self.active -= 1

    def close_door(self) -> bool:
        """Take nobody new until `closing` is unset; False where nobody uses it, or it can never leave."""
        with self._gate:
            self.closing = self.active > 0 and (self.pipe is not self.spec.source or not self._placed)
            return self.closing

    def park(self) -> bool:
        """Move the weights to host memory as they are, where nobody uses them and nothing places them piece by piece;
        whether that was done."""
        with self._gate:
            if self._moving.locked() or self.active or self.pipe is None or self._home or self._placed:
                return False
            self._moving.acquire()
        try:
            # Before anything moves: what is left half way by a failure is brought back whole.
            self._home, self._inputs_on = self.device, None
            with BUILDING:  # what computes elsewhere is accelerated anew
                self.pipe.to("cpu")  # without the gate: whoever asks for a picture passes it
        finally:
            self._moving.release()
        _free()
        logger.info("parked %s", self.alias)
        return True

    def unload(self) -> bool:
        """Drop the weights, where they can be loaded again and nobody uses them; whether that was done."""
        with self._gate:
            if self._moving.locked() or self.active or self.pipe is None or self.pipe is self.spec.source:
                return False
            # Not restored: that would fetch the originals of what is in few bits, to drop them.
            self.pipe = self._home = self._inputs_on = None
            self._classes.clear()
            self.layouts.clear()
            self._applied = Mode(preset=None)
            self._loras.forget()
        _free()
        logger.info("unloaded %s", self.alias)
        return True

    def close(self) -> None:
        """Give back: the weights, or the pipeline as it was handed in."""
        with self._moving:
            pass
        if not self.unload() and self.pipe is not None:
            self._return()
            self._loras.take_off(self.pipe)
            try:
                self._accelerate(None)
            except InputError as error:
                logger.warning("%s stays accelerated: %s", self.alias, error)

    def as_class(self, pipeline: type[Any]) -> Any:
        """The loaded pipeline, or one of another class around the same components, of the same configuration."""
        if type(self.pipe).__name__ == pipeline.__name__:
            return self.pipe
        with self.lock:
            if pipeline not in self._classes:
                named = inspect.signature(pipeline.__init__).parameters
                # What a model says of itself too: that it is distilled, that its first frame is a picture.
                held = {**self.pipe.config, **self.pipe.components}
                self._classes[pipeline] = pipeline(**{name: held[name] for name in named if name in held})
            return self._classes[pipeline]

    def _load(self) -> None:
        started = time.monotonic()
        if self._home:
            self._return()
            logger.info("%s is back after %.1f s", self.alias, time.monotonic() - started)
            return
        try:
            pipe: Any = load_source(self.source, dtype=self.spec.dtype, device=self.spec.device)
            if self.spec.few_step and self.source.path is not None:
                few_step.use_few_step(pipe, self.source.path / few_step.FOLDER)
            vae = getattr(pipe, "vae", None)
            # The pipeline would cast it to and fro around each decode, under the hands of other requests.
            if vae is not None and vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False):
                vae.to(torch.float32)
        except Exception as error:
            self.broken = True
            if fatal(error):
                raise
            if out_of_memory(error):
                raise OutOfMemory(f"the device has too little memory for the model {self.alias}") from None
            # What it says names files; that is for the log.
            logger.error("%s cannot be loaded: %s", self.alias, first_line(error))
            raise Unavailable(f"the model {self.alias} cannot be loaded") from error
        self.pipe, self._given = pipe, _config(pipe)
        self.load_seconds, self.broken = time.monotonic() - started, False
        logger.info("loaded %s in %.1f s", self.alias, self.load_seconds)

    def _return(self) -> None:
        """Have a parked model where it computes."""
        if self._home:
            self.pipe.to(self._home)
            self._home = self._inputs_on = None

    @property
    def _placed(self) -> bool:
        """Whether something already moves its weights to and fro."""
        acceleration = acceleration_of(self.pipe)
        budget = acceleration is not None and acceleration.target.placement is not None
        return budget or any(hasattr(part, "_hf_hook") or _streams(part) for part in self._components)

    def _apply(self, mode: Mode) -> None:
        """Bring the pipeline into a mode. A failure leaves it in none, so that the next request starts over."""
        self._applied = Mode(preset=None, alone="changing")
        self._inputs_on = None
        self.layouts.clear()
        few_bits = bool(mode.loras) and in_few_bits(self.pipe)
        if few_bits:
            accelerate(self.pipe, mode.preset or self._given or Config())
        self._loras.put(self.pipe, mode.loras, model=self.alias)
        if not few_bits:
            self._accelerate(mode.preset)
        self._applied = mode

    def _accelerate(self, preset: Any) -> None:
        """As a preset says; None: as it was when it came. Raises InputError."""
        wanted = self._given if preset is None else preset
        if wanted is None:
            restore(self.pipe)
        else:
            accelerate(self.pipe, wanted)

    @property
    def inputs_on(self) -> torch.device:
        """Where its pipeline makes what its modules are given. Stock looks through every module for it, each time."""
        known = self._inputs_on or self.pipe._execution_device
        self._inputs_on = known
        return known

    @property
    def device(self) -> torch.device:
        """Where its denoiser computes, loaded or not."""
        if self._home:
            return self._home
        if self.pipe is None:
            return resolve_device(self.spec.device)
        parts = [part for part in self._components if isinstance(part, torch.nn.Module)]
        return device_of(parts[0]) if parts else torch.device("cpu")


@contextmanager
def _taken(lock: threading.Lock, check: Callable[[], None]) -> Iterator[None]:
    """Hold a lock; while somebody else does, `check` is called, and may raise."""
    while not lock.acquire(timeout=LOOK):
        check()
    try:
        yield
    finally:
        lock.release()


def _config(pipe: Any) -> Config | None:
    acceleration = None if pipe is None else acceleration_of(pipe)
    return acceleration.target.config if acceleration else None


def _streams(part: Any) -> bool:
    return isinstance(part, torch.nn.Module) and any("offload" in name for name in hooks_of(part))


def _free() -> None:
    """Let go of what nobody holds but itself, and give the device its memory back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _source(alias: str, spec: Spec) -> Source:
    if isinstance(spec.source, str | Path):
        source = find(spec.source)
        return few_step.source_of(source) if spec.few_step else source
    pipe = spec.source
    index = {**pipe.config, **pipe.components}
    return Source(name=alias, path=None, pipeline=type(pipe).__name__, family=known_family(pipe), index=index)


def lane_of(module: torch.nn.Module) -> Lane | None:
    """The lane of an accelerated denoiser."""
    acceleration = acceleration_of(module)
    lanes = acceleration.target.lanes.values() if acceleration else ()
    return next((lane for lane in lanes if lane.denoiser is module), None)
