"""What a pass is, and what it works on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch

from vivace.config import Config, Switch
from vivace.one_off import behind

if TYPE_CHECKING:
    from vivace.family import Family
    from vivace.lane import Lane
    from vivace.lora.encoder import Quantised
    from vivace.memory.placement import Placement
    from vivace.prompts import Prompts
    from vivace.quant.layers import Layer
    from vivace.quant.originals import Base

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Note:
    """One line of the report: what a pass did, or left alone and why."""

    name: str  # of the pass
    done: bool
    detail: str


@dataclass(kw_only=True)
class Target:
    """A pipeline or bare denoiser that is being accelerated."""

    subject: Any
    family: Family | None
    config: Config
    denoisers: dict[str, torch.nn.Module]  # by their name in the pipeline
    pipeline: type | None = None  # the class of the pipeline; None for a bare denoiser
    place: torch.device | None = None  # where they will compute, when that is not where they are
    prompts: Prompts | None = None  # what is remembered of the last prompts
    placement: Placement | None = None  # where weights will live, when a budget was given
    lanes: dict[str, Lane] = field(default_factory=dict)  # filled when every check has passed
    notes: list[Note] = field(default_factory=list)
    undo: ExitStack = field(default_factory=ExitStack)
    bases: list[Base] = field(default_factory=list)  # originals of quantised layers; they outlive a re-acceleration
    encoders: list[Quantised] = field(default_factory=list)  # text encoders in few bits
    layers: dict[str, tuple[Layer, ...]] = field(default_factory=dict)  # denoiser -> what became of its linears
    parts: dict[str, ref[torch.nn.Module]] = field(default_factory=dict)  # the pipeline's components; not held
    _told: set[str] = field(default_factory=set)
    inference: bool = False  # whether weights are tensors of torch's inference mode

    @property
    def device(self) -> torch.device:
        """Where the denoiser computes: its hook's device when it is offloaded, else its parameters'."""
        return self.place or device_of(next(iter(self.denoisers.values())))

    @property
    def dtype(self) -> torch.dtype:
        """The denoiser's floating point type."""
        return next(iter(types_of(next(iter(self.denoisers.values())))), torch.get_default_dtype())

    def repeated_blocks(self) -> Iterator[tuple[str, torch.nn.Module]]:
        """The repeated blocks of every denoiser, named within it."""
        for denoiser in self.denoisers.values():
            for name in self.family.blocks if self.family else repeating_lists(denoiser):
                for index, block in enumerate(denoiser.get_submodule(name).children()):
                    yield f"{name}.{index}", block

    def remember_parts(self) -> None:
        """Know from now on what was accelerated."""
        self.parts = {name: ref(part) for name, part in modules_of(self.subject).items()}

    def replaced(self) -> list[str]:
        """The components in whose place the pipeline has others since: those are stock."""
        now = {name: uncompiled(behind(getattr(self.subject, name, None))) for name in self.parts}
        return [name for name, part in now.items() if part is not None and part is not self.parts[name]()]

    def warn_of_replaced(self) -> None:
        """Say once of each replaced component that it is stock."""
        for name in (name for name in self.replaced() if name not in self._told):
            logger.warning("the %s was replaced and is stock; call vivace.accelerate again", name)
            self._told.add(name)

    def done(self, name: str, detail: str) -> None:
        self.notes.append(Note(name=name, done=True, detail=detail))

    def left(self, name: str, detail: str) -> None:
        self.notes.append(Note(name=name, done=False, detail=detail))


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One reversible change, done once.

    `check` says why the pass cannot or should not run, None when it will; it changes nothing. A reason is an error
    where the user asked (`wants` is "on") and a line in the report where the choice was ours ("auto"). `apply` makes
    the change and pushes its undo on `target.undo`. `forecast` is the report's line for a pass that would run, and
    `adds_bytes` what it would add to the weights' bytes on the device; both look at shapes alone.
    """

    name: str
    why_here: str  # the reason for its place in the order
    wants: Callable[[Config], Switch]
    check: Callable[[Target], str | None]
    apply: Callable[[Target], None]
    forecast: Callable[[Target], str] = lambda target: "will be done"
    adds_bytes: Callable[[Target], int] = lambda target: 0


def types_of(module: torch.nn.Module) -> dict[torch.dtype, None]:
    """The floating point types of its parameters, without those that its class keeps in fp32 beside any other type."""
    apart = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    parameters = (p.dtype for name, p in module.named_parameters() if apart.isdisjoint(name.split(".")))
    return dict.fromkeys(dtype for dtype in parameters if dtype.is_floating_point)


def modules_of(pipe: Any) -> dict[str, torch.nn.Module]:
    """A pipeline's components that are modules, by name; a bare module has none."""
    parts = {} if isinstance(pipe, torch.nn.Module) else getattr(pipe, "components", None) or vars(pipe)
    found = {name: uncompiled(behind(part)) for name, part in parts.items()}
    return {name: part for name, part in found.items() if isinstance(part, torch.nn.Module)}


def in_inference(module: torch.nn.Module) -> bool:
    """Whether its weights were made in torch's inference mode."""
    return any(parameter.is_inference() for parameter in module.parameters())


def device_of(module: torch.nn.Module) -> torch.device:
    """Where `module` computes: the device its weights come to, else where its parameters lie."""
    if (placed := getattr(type(module), "vivace_device", None)) is not None:
        return placed
    # Not getattr, nor `parameters`: this is asked at every call, and what a module lacks is dear to look for.
    hooked = getattr(vars(module).get("_hf_hook"), "execution_device", None)
    if hooked is not None:
        return torch.device(hooked)
    for child in module.modules():
        for parameter in child._parameters.values():
            if parameter is not None:
                return parameter.device
    return torch.device("cpu")


def hooks_of(module: torch.nn.Module) -> dict[str, Any]:
    """The diffusers hooks on a module; the empty registry that a call of `cache_context` leaves holds none."""
    return getattr(getattr(module, "_diffusers_hook", None), "hooks", {})


def uncompiled(part: Any) -> Any:
    """The module inside of the wrapper that `torch.compile` returns, whose class has none of its methods; else itself.

    Of an autoencoder the wrapper compiles its `forward`, which no pipeline calls.
    """
    return part._orig_mod if isinstance(part, torch._dynamo.OptimizedModule) else part


def repeating_lists(denoiser: torch.nn.Module) -> list[str]:
    """The outermost module lists that hold at least two blocks of one class."""
    names: list[str] = []
    for name, module in denoiser.named_modules():
        if any(name.startswith(f"{outer}.") for outer in names) or not isinstance(module, torch.nn.ModuleList):
            continue
        if len(module) >= 2 and len({type(block) for block in module}) == 1:
            names.append(name)
    return names
