"""Who is timed: our presets, and the peers that users have today."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any, TypeGuard

from vivace.bench.workload import Workload
from vivace.errors import InputError

if TYPE_CHECKING:
    import torch

SMALL = 1_000_000_000
"""Denoisers of at most so many parameters spend their time launching kernels: there peers get CUDA graphs too."""

REFERENCE = "fp32"
"""The contestant that is no contestant: the same maths in 32 bit, from which every other's error is measured."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One way to run a model. `fields` are Config fields of one of our presets, as `FIELD=VALUE`."""

    name: str  # of a preset, a peer, a ladder's rung, or REFERENCE
    ours: bool = False
    fields: tuple[str, ...] = ()
    rung: bool = False
    quiz: int = 0  # captions of the built-in model's exam that it draws after it was timed

    @property
    def label(self) -> str:
        """What its row is called."""
        return " ".join(("vivace", self.name, *self.fields)) if self.ours else self.name


@dataclass(frozen=True, kw_only=True)
class Peer:
    """How a peer makes a pipeline or denoiser fast: `prepare` changes it in place and says what was done."""

    prepare: Callable[[Any, Workload], str]
    order: int  # how long it takes to get going: the quick ones run first
    rate: str | None = None  # whose roofline its time is held against; None: the workload's type


def prepare(contestant: Contestant, subject: Any, workload: Workload) -> str:
    """Make `subject` as fast as the contestant can, in place; returns one line of what was done.

    Raises InputError where the contestant does not offer this.
    """
    if contestant.ours:
        from vivace.accelerate import accelerate
        from vivace.config import parse_fields

        # A bench asks for one picture again and again: with its prompt remembered it would not be a picture's time.
        fields = ("prompts=off", *contestant.fields) if workload.end_to_end else contestant.fields
        accelerate(subject, contestant.name, **parse_fields(fields))
        request = "" if workload.end_to_end else "; a later step of a request, what prompt and times decide kept"
        return "vivace.accelerate(" + ", ".join((f'"{contestant.name}"', *fields)) + ")" + request
    if contestant.rung:
        from vivace.bench.rungs import climb

        return climb(subject, workload, to=contestant.name)
    if contestant.name == REFERENCE:
        return widen(subject, workload)
    return PEERS[contestant.name].prepare(subject, workload)


def ours_of(presets: Sequence[str], fields: Sequence[str]) -> list[Contestant]:
    """Our presets, each with `fields` and those of its own, which stand after its name: `fast keep_base=no`.

    Raises InputError for what is no preset, no field or no value of it.
    """
    from vivace.config import parse_fields, resolve

    found = []
    for preset in presets:
        name, *own = preset.split()
        resolve(name, **parse_fields([*fields, *own]))
        found.append(Contestant(name=name, ours=True, fields=(*fields, *own)))
    return found


def contestants_of(*, presets: Sequence[str], fields: Sequence[str], peers: Sequence[str]) -> list[Contestant]:
    """Ours first, then the peers by how long they take to get going. Raises InputError for an unknown name."""
    ours = ours_of(presets, fields)
    for peer in peers:
        if peer not in PEERS:
            raise InputError(f"unknown peer {peer!r}; --peers takes {', '.join(PEERS)}")
    return ours + [Contestant(name=peer) for peer in sorted(peers, key=lambda peer: PEERS[peer].order)]


def denoisers_of(subject: Any, workload: Workload) -> Iterator[Any]:
    """The denoisers of a workload's pipeline, or the bare denoiser that it is."""
    if not workload.end_to_end:
        yield subject
        return
    for name in workload.facts.denoisers:
        if getattr(subject, name, None) is not None:
            yield getattr(subject, name)


def widen(subject: Any, workload: Workload) -> str:
    """Make a pipeline or denoiser compute in float32, in place; says so."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    subject.to(torch.float32)
    return "stock, weights widened to float32, without TF32"


def _eager(subject: Any, workload: Workload) -> str:
    return "stock diffusers"


def _compile_regional(subject: Any, workload: Workload) -> str:
    for denoiser in denoisers_of(subject, workload):
        if not getattr(denoiser, "_repeated_blocks", None):
            raise InputError(f"not offered by {type(denoiser).__name__}")
        use_channels_last(denoiser)
        denoiser.compile_repeated_blocks(fullgraph=True)
    return f"compile_repeated_blocks(fullgraph=True){_layout(subject, workload)}"


def _compile_full(subject: Any, workload: Workload) -> str:
    mode = None
    for denoiser in denoisers_of(subject, workload):
        use_channels_last(denoiser)
        mode = compile_whole(denoiser)
    graphs = f", mode={mode!r}" if mode else ""
    return f"torch.compile(fullgraph=True{graphs}){_layout(subject, workload)}"


def compile_whole(part: Any) -> str | None:
    """Compile a denoiser or a VAE's decoder in one piece; returns the mode: a small one's launches are recorded too."""
    small = sum(parameter.numel() for parameter in part.parameters()) <= SMALL
    mode = "reduce-overhead" if small and next(part.parameters()).is_cuda else None
    part.compile(fullgraph=True, mode=mode)
    return mode


def may_quantise(module: Any, name: str, workload: Workload) -> TypeGuard[torch.nn.Linear]:
    """Whether a peer may quantise a module: a linear of many rows. torch's int8 product refuses 16 rows and fewer."""
    import torch

    kept = (*workload.facts.keep_16bit, *workload.facts.one_row)
    return isinstance(module, torch.nn.Linear) and not any(fnmatch(name, pattern) for pattern in kept)


def _torchao(subject: Any, workload: Workload) -> str:
    try:
        from torchao.quantization import (  # pyright: ignore[reportMissingImports]
            Float8DynamicActivationFloat8WeightConfig,
            PerRow,
            quantize_,
        )
    except ImportError as error:
        raise ModuleNotFoundError("torchao is not installed; pip install -c constraints.txt torchao") from error

    def wanted(module: torch.nn.Module, name: str) -> bool:
        return may_quantise(module, name, workload) and module.in_features % 16 == 0 and module.out_features % 16 == 0

    for denoiser in denoisers_of(subject, workload):
        quantize_(denoiser, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()), filter_fn=wanted)
    regional = all(getattr(denoiser, "_repeated_blocks", None) for denoiser in denoisers_of(subject, workload))
    return "torchao fp8, row scales; " + (_compile_regional if regional else _compile_full)(subject, workload)


def _cache_dit(subject: Any, workload: Workload) -> str:
    if not workload.end_to_end:
        raise InputError("it saves whole steps, not time within one; add --end-to-end")
    try:
        import cache_dit  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ModuleNotFoundError("cache-dit is not installed; pip install -c constraints.txt cache-dit") from error
    cache_dit.enable_cache(subject)
    return "cache_dit.enable_cache(pipe)"


def _convolutional(denoiser: Any) -> bool:
    """Whether the memory order of convolutions matters: a patch embedding alone does not make it."""
    import torch

    return sum(isinstance(m, torch.nn.Conv2d) and max(m.kernel_size) > 1 for m in denoiser.modules()) > 3


def use_channels_last(denoiser: Any) -> None:
    import torch

    for module in denoiser.modules() if _convolutional(denoiser) else ():
        if isinstance(module, torch.nn.Conv2d):  # a video's convolutions over time have weights of five dimensions
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)


def _layout(subject: Any, workload: Workload) -> str:
    return ", channels_last" if any(map(_convolutional, denoisers_of(subject, workload))) else ""


PEERS: dict[str, Peer] = {
    "eager": Peer(prepare=_eager, order=0),
    "cache-dit": Peer(prepare=_cache_dit, order=1),
    "compile": Peer(prepare=_compile_regional, order=2),
    "torchao": Peer(prepare=_torchao, order=3, rate="fp8"),
    "compile-full": Peer(prepare=_compile_full, order=4),
}
