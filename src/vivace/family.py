"""What is known about a model: the `Family` value, the `Split` of its denoiser, and `family_of`."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from vivace.errors import InputError
from vivace.memory.here import Bring, here, nothing

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from vivace.fused.foresight import Foresight


@dataclass
class State:
    """What flows through the blocks of one denoiser call.

    `x` is the image (or video) stream, `text` the text stream where the model updates one, `skips` the residuals a
    UNet's down path leaves for its up path. `context` holds what every block reads and none changes (modulation
    embedding, rotary tables, cross-attention text, masks, control residuals, ...). `ahead` is what a fused block has
    computed for the next one, which uses it only where the streams are still the very tensors it was made of. Where the
    next block may be skipped, `text` may be what it is still to be made of by that one (`vivace.fused.joint.Late`).
    """

    x: torch.Tensor
    text: torch.Tensor | None = None
    skips: tuple[torch.Tensor, ...] = ()
    context: dict[str, Any] = field(default_factory=dict)
    ahead: Any = None


@dataclass(frozen=True, kw_only=True)
class Block:
    """One repeated block: its module's name inside the denoiser, and the step it does on a `State`.

    It leaves the tensors of the state it is given as they were: caches compare them with what comes after.
    """

    name: str  # e.g. "transformer_blocks.3"
    module: torch.nn.Module
    forward: Callable[[State], State]


def _ready(state: State, first: int, last: int | None) -> State:
    """The prologue left nothing out."""
    return state


@dataclass(frozen=True, kw_only=True)
class Split:
    """A denoiser call in three parts; composed, they compute exactly what `denoiser.forward(**kwargs)` computes.

    `prologue(**kwargs)` takes the keyword arguments of the denoiser's own forward, `epilogue(state)` returns what that
    forward returns (a tuple or an output object, as `return_dict` asks).

    `once`, where a split has it, computes what does not depend on the step from the arguments named in `once_inputs`,
    and from the shapes alone of those in `once_shapes`; its result is the prologue's further argument `once`. A caller
    who keeps it from step to step passes it in.

    `ready(state, first, last)` makes what the blocks from `first` up to `last`, not included (None: all that follow),
    read of the context and the prologue left out, because a cache may skip them. It comes before these blocks, and at
    least once, with any, before the epilogue. `signal(state)` is what TeaCache watches, once the first block is ready.
    `bring` gets the weights of blocks that are streamed. `foresight`, where a fused split has it, makes of a request's
    timesteps what the prologue takes as `once["made"]` (`vivace.fused.foresight`).
    """

    prologue: Callable[..., State]
    blocks: tuple[Block, ...]
    epilogue: Callable[[State], Any]
    once: Callable[..., Mapping[str, Any]] | None = None
    once_inputs: tuple[str, ...] = ()
    once_shapes: tuple[str, ...] = ()
    ready: Callable[[State, int, int | None], State] = _ready
    signal: Callable[[State], torch.Tensor] | None = None
    bring: Bring = nothing
    foresight: Foresight | None = None

    def __call__(self, **kwargs: Any) -> Any:
        if self.once is not None and "once" not in kwargs:
            kwargs["once"] = self.prepare(kwargs)
        return self.epilogue(self.through(self.prologue(**kwargs)))

    def through(self, state: State, first: int = 0, last: int | None = None) -> State:
        """The state after the blocks from `first` up to `last`, not included; None: all that follow."""
        state = self.ready(state, first, last)
        blocks = self.blocks[first:last]
        with self.bring(block.module for block in blocks):
            for block in blocks:
                with here(block.module):
                    state = block.forward(state)
        return state

    def prepare(self, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """What `once` makes of a call's arguments."""
        assert self.once is not None
        return self.once(**{name: kwargs.get(name) for name in (*self.once_inputs, *self.once_shapes)})


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One published model of a family, as facts: enough to build it at true size without a download."""

    denoiser: Mapping[str, Any]  # configuration of the denoiser class
    vae: Mapping[str, Any] = field(default_factory=dict)  # what differs from the family's VAE configuration
    text_encoders: Mapping[str, tuple[str, Mapping[str, Any]]] = field(default_factory=dict)  # slots that differ
    scheduler: Mapping[str, Any] = field(default_factory=dict)  # what differs from the family's configuration
    parameters: int | None = None  # of the denoiser, counted from the published configuration
    hub_id: str = ""
    pipeline: str | None = None  # diffusers pipeline class name, where it is not the family's first
    size: tuple[int, int] = (1024, 1024)  # native width, height in pixels
    multiple: int | None = None  # of pixel sizes, where it differs
    frames: int = 1
    experts: int = 1  # denoisers of this shape, each for its share of the steps
    steps: int = 28
    guidance: float = 5.0
    text_tokens: int = 77  # the usual length of the text sequence the denoiser sees
    batch: int = 1  # 2 where guidance is batched
    guidance_kind: Literal["embedded", "batched", "two_calls", "none"] | None = None  # where it differs
    prediction: Literal["epsilon", "v", "flow"] | None = None  # where it differs
    teacache: tuple[float, ...] | None = None  # polynomial, highest power first (arXiv 2411.19108)

    @property
    def usual(self) -> dict[str, Any]:
        """The arguments of `Family.inputs` for a call as the model is used."""
        return {"size": self.size, "frames": self.frames, "text_tokens": self.text_tokens, "batch": self.batch}


@dataclass(frozen=True, kw_only=True)
class Family:
    """Every fact about a model family. No other file names one."""

    name: str  # the module's stem: "flux"
    title: str
    pipelines: tuple[str, ...]  # diffusers pipeline class names, the text-to-image (or -video) one first
    denoisers: tuple[str, ...]  # pipeline attributes: ("transformer",), or ("transformer", "transformer_2")
    denoiser_class: str  # diffusers model class name
    vae_class: str
    blocks: tuple[str, ...]  # names of the module lists that repeat, in call order
    guidance: Literal["embedded", "batched", "two_calls", "none"]
    prediction: Literal["epsilon", "v", "flow"]
    keep_16bit: tuple[str, ...]  # fnmatch patterns of module names that stay in 16 bit under quantisation
    variants: Mapping[str, Variant]  # the first is the default
    split: Callable[[Any], Split]  # the denoiser's stock Split
    tiny: Callable[..., DiffusionPipeline]  # tiny(pipeline_class: str | None = None) -> a random pipeline for the CPU
    inputs: Callable[..., dict[str, Any]]  # (denoiser, *, size, batch, frames, text_tokens, seed) -> forward kwargs
    one_row: tuple[str, ...] = ()  # patterns of linears that read one row a sample: stored in 8 bits, products in 16
    signal: Callable[[Any, State], torch.Tensor] | None = None  # (denoiser, stock state) -> what TeaCache watches
    grid: Callable[[Any, Mapping[str, Any]], tuple[int, int, int]] | None = None  # frames, rows, columns of tokens
    text_encoders: Mapping[str, tuple[str, Mapping[str, Any]]] = field(default_factory=dict)  # slot -> class, config
    vae: Mapping[str, Any] = field(default_factory=dict)  # the VAE's configuration, where not its class's default
    scheduler: tuple[str, Mapping[str, Any]] = ("", {})  # class, configuration; what a single file does not say
    recognise: Callable[[Mapping[str, Any]], bool] | None = None  # a bare denoiser by configuration; None: by class
    multiple: int = 16  # pixel sizes must be multiples of this
    largest: Callable[[Any], int] | None = None  # (denoiser) -> the longest side that it has positions for, in pixels
    media: Literal["image", "video"] = "image"
    silent: float = 1.0  # guidance up to which a pipeline leaves it out, and hears no negative prompt
    takes: frozenset[str] = frozenset({"prompt"})  # of: prompt negative guidance true_cfg image mask strength control
    # pipeline class -> what a model of another class says of itself where that class runs it too
    only_with: Mapping[str, str] = field(default_factory=dict)
    several: frozenset[str] = frozenset()  # pipeline classes that make one picture of several
    own_size: frozenset[str] = frozenset()  # pipeline classes that go by the shape of the image, whatever size is asked
    packed: int = 1  # frames that the VAE makes one of, after the first
    mask_channels: int | None = None  # input channels by which its inpaint pipeline knows to blend in the latents
    single_file: bool = False  # diffusers reads its original-layout checkpoint
    shared: frozenset[str] = frozenset()  # arguments of the denoiser's call that have no batch dimension
    listed: frozenset[str] = frozenset()  # arguments of it that are lists with one entry for each picture
    # text argument that may be padded at its end -> the argument of its mask; None: a list, which the model pads itself
    padded: Mapping[str, str | None] = field(default_factory=dict)

    def full(
        self,
        variant: str | None = None,
        *,
        component: str = "denoiser",
        device: str | torch.device = "cuda",
        dtype: torch.dtype | None = None,
    ) -> torch.nn.Module:
        """The denoiser (or `component="vae"`, or a text encoder's slot) at true size, random weights, on `device`.

        Raises InputError for an unknown variant or component. Weights are drawn on the device; nothing is downloaded.
        """
        from vivace.families.build import full_component

        return full_component(self, self.variant(variant), component, device=device, dtype=dtype)

    def variant(self, name: str | None = None) -> Variant:
        """The named variant, or the default one. Raises InputError where there is none of that name."""
        if name is None:
            return next(iter(self.variants.values()))
        if name not in self.variants:
            raise InputError(f"{self.name} has no variant {name!r}; it has {', '.join(self.variants)}")
        return self.variants[name]

    def nearest(self, config: Mapping[str, Any]) -> Variant:
        """The published model that a denoiser of this configuration is, else the default one."""
        same = (one for one in self.variants.values() if all(config.get(k) == v for k, v in one.denoiser.items()))
        return next(same, self.variant())

    def usual(self, denoiser: Any) -> dict[str, Any]:
        """The arguments of `inputs` for a call as a model like this is used, no larger than it has positions for."""
        found = self.nearest(denoiser.config).usual
        if self.largest is None:
            return found
        longest = self.largest(denoiser)
        return {**found, "size": tuple(min(side, longest) for side in found["size"])}


class UnknownFamilyError(InputError):
    """No family is recorded for a pipeline class."""


def family_of(pipe: object) -> Family:
    """The family of a pipeline, pipeline class, pipeline class name, or bare denoiser; subclasses match too.

    Raises UnknownFamilyError, which names the families of its denoiser's class, else the nearest known class, and says
    how to add a family.
    """
    found = known_family(pipe)
    if found is None:
        raise UnknownFamilyError(_unknown(pipe))
    return found


def known_family(pipe: object) -> Family | None:
    """As `family_of`; None where no family is recorded."""
    from vivace.families import FAMILIES

    for name in [pipe] if isinstance(pipe, str) else _ancestry(pipe):
        for family in FAMILIES.values():
            if name in family.pipelines or (name == family.denoiser_class and _recognised(family, pipe)):
                return family
    return None


def _unknown(pipe: object) -> str:
    """What to say of a pipeline or model that belongs to no family."""
    from vivace.families import FAMILIES

    name = pipe if isinstance(pipe, str) else _ancestry(pipe)[0]
    for denoiser in _denoisers(pipe):
        kin = [family for family in FAMILIES.values() if _is_of(denoiser, family)]
        if kin:
            names = " and ".join(family.name for family in kin)
            return (
                f"no family is recorded for {name}; its denoiser, a {kin[0].denoiser_class}, is that of {names}; "
                f"where it is called as theirs is, name the class among the pipelines in families/{kin[0].name}.py"
            )
    known = {name: family.name for family in FAMILIES.values() for name in (*family.pipelines, family.denoiser_class)}
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return (
        f"no family is recorded for {name}; the nearest is {near} ({known[near]}); "
        "to add one, write families/<name>.py and one line in families/__init__.py (CONTRIBUTING.md)"
    )


def _denoisers(pipe: object) -> list[object]:
    """The denoisers of a pipeline; of a class, or the name of one of diffusers', what its constructor says of them."""
    from vivace.families import FAMILIES

    if isinstance(pipe, str):
        import diffusers

        pipe = getattr(diffusers, pipe, object)
    slots = {slot for family in FAMILIES.values() for slot in family.denoisers}
    if not isinstance(pipe, type):
        return [module for slot in sorted(slots) if (module := getattr(pipe, slot, None)) is not None]
    hints = inspect.signature(pipe.__init__).parameters
    return [str(hints[slot].annotation) for slot in sorted(slots & hints.keys())]


def _is_of(denoiser: object, family: Family) -> bool:
    if isinstance(denoiser, str):
        return family.denoiser_class in re.findall(r"\w+", denoiser)
    return known_family(denoiser) is family


def _ancestry(pipe: object) -> list[str]:
    return [c.__name__ for c in (pipe if isinstance(pipe, type) else type(pipe)).__mro__]


def _recognised(family: Family, denoiser: object) -> bool:
    """Whether a bare denoiser is this family's: its configuration decides where families share the class."""
    config = getattr(denoiser, "config", None)
    return family.recognise is None or not isinstance(config, Mapping) or family.recognise(config)
