"""What a distillation is asked for: `DistillConfig`, read from YAML or made in Python. Loads no torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Literal

from vivace.config import resolve
from vivace.distill.typed import checked
from vivace.errors import InputError

Distance = Literal["l2", "l1", "huber", "features", "lpips"]
Adversary = Literal["hinge", "least_squares", "non_saturating", "vanilla", "wasserstein"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stretch of training: how long, how fine the teacher's grid is, where on it to train, what to weigh."""

    batches: int
    """Optimizer steps."""
    steps: int = 32
    """K: the teacher's steps from pure noise to the picture."""
    guidance: tuple[float, float] = (3.0, 13.0)
    """The teacher's guidance is drawn from this range, once for every batch."""
    modes: tuple[float, ...] = (0.25, 0.25, 0.25, 0.25)
    """Weights of the timestep mixture's modes, from pure noise to low noise; K has to divide by their number."""
    simulated: float = 0.0
    """Share of the batches below pure noise that start from the student's own pictures in place of the data's."""
    distillation: float = 1.0
    """Weight of the distance to what the teacher's solver reaches."""
    matching: float = 0.0
    """Weight of distribution matching."""
    adversarial: float = 0.0
    """Weight of the adversarial loss."""


@dataclass(frozen=True, kw_only=True)
class Student:
    """What is trained."""

    kind: Literal["lora", "full"] = "lora"
    """A LoRA beside the teacher's weights, or a copy of all of them."""
    rank: int = 64
    """Rank of the LoRA; its alpha is the same, so that no reader has to know it."""
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Endings of the module names that get a LoRA."""
    ema: float | None = None
    """Decay of the running mean of the weights, which is then what is saved as the result."""
    gradient_checkpointing: Literal[True, False, "auto"] = False
    """Compute activations again in the backward pass in place of keeping them; auto: unless the GPU has room to keep
    them, which is measured at the start on one picture. On a CPU, and with parallel: fsdp, auto is true."""
    compile: bool = False
    """Compile its blocks, and the critic's, on a GPU (torch.compile): a minute or so, which many batches win back."""


@dataclass(frozen=True, kw_only=True)
class Discriminator:
    """The network that tells the student's features from real ones."""

    loss: Adversary = "least_squares"
    """The adversarial objective."""
    width: int = 64
    """Channels after its first convolution."""
    lr: float = 1e-5
    """Its learning rate."""
    block: str | None = None
    """The teacher's block whose output it sees; None: the UNet's mid block, a transformer's middle block."""
    times: tuple[float, ...] = (10.0, 250.0, 500.0, 750.0)
    """Noise levels, of 1000, at which the teacher's features are taken."""
    real: Literal["data", "teacher"] = "data"
    """What counts as real: the data, or what the teacher's solver reached."""


@dataclass(frozen=True, kw_only=True)
class Critic:
    """The denoiser of the student's own pictures: a LoRA beside the teacher's weights, on the student's targets."""

    rank: int = 64
    """Rank of its LoRA."""
    lr: float = 1e-5
    """Its learning rate."""
    updates: int = 1
    """Its optimizer steps for every batch of the student's pictures: too few, and it lags behind the student."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where pictures and captions come from."""

    kind: Literal["shards", "folder", "builtin", "cached"] = "shards"
    """Webdataset tar shards, a folder of pictures, the built-in model's renderer, or what `--precache` wrote."""
    path: str | None = None
    """Shards as a path or URL, with {000..127} for a range; or the folder."""
    captions: tuple[str, ...] = ("caption", "text")
    """Keys of a sample's JSON that may hold its caption, the first found counts."""
    score: str = "aesthetic_score"
    """Key of a sample's JSON that `least_score` looks at."""
    least_score: float | None = None
    """Samples with a lower score, or none, are left out."""
    least_side: int = 0
    """Pictures with a shorter side, in pixels, are left out."""
    ratios: tuple[float, ...] = ()
    """Aspect ratios (width / height) of the buckets, of which a picture goes to the nearest; empty: that of `size`."""
    window: int = 4
    """Shards that are mixed with each other."""
    workers: int = 4
    """Threads that read and decode ahead."""
    cache: str | None = None
    """Folder for shards that come by URL; None: beside the output."""


@dataclass(frozen=True, kw_only=True)
class Conditioner:
    """One further thing that teacher and student see beside text and noise."""

    join: Literal["argument", "concatenated", "cross_attended", "vector"]
    """How it joins: as an argument of the stock pipeline's call, as channels, as text tokens, or added to the pooled
    text."""
    source: str
    """A name of `vivace.distill.conditioners.SOURCES`, or module:function of your own."""
    argument: str | None = None
    """With join=argument: the argument of the pipeline's call."""
    guided: bool = False
    """Whether guidance strengthens it as it does the text: the unguided half then gets zeros."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the source."""


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """How the student learns: AdamW."""

    accumulate: int = 1
    """Batches whose gradients make one optimizer step."""
    lr: float = 1e-5
    """The student's learning rate."""
    warmup: int = 0
    """Optimizer steps over which the learning rates rise."""
    decay: int = 0
    """Optimizer steps, the last ones, over which the learning rates fall towards 0."""
    weight_decay: float = 1e-2
    """AdamW's."""
    clip: float | None = 1.0
    """Largest norm of the student's gradient, and of the critic's."""


@dataclass(frozen=True, kw_only=True)
class Records:
    """What is written along the way."""

    save_every: int = 500
    """Optimizer steps between checkpoints."""
    keep: int = 2
    """Checkpoints that stay."""
    sample_every: int = 500
    """Optimizer steps between sample grids; 0: none."""
    prompts: tuple[str, ...] = ()
    """What the grids show; with conditioners they show the data's first pictures, and no prompt."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """accelerate's trackers."""
    steps: tuple[int, ...] = (4,)
    """Numbers of steps that the grids show; the first is what the student is made for."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """A few-step distillation, after Flash Diffusion (arXiv 2406.02347)."""

    output: str
    """Folder for checkpoints, logs and the result."""
    stages: tuple[Stage, ...]
    """What happens when; the last stage's settings are those of the end."""
    teacher: str = "builtin"
    """builtin, a pipeline folder, a .safetensors file or a hub id."""
    pipeline: str | None = None
    """diffusers pipeline class to load the teacher as; None: its own."""
    control: str | None = None
    """Folder or hub id of the ControlNet or T2I-Adapter that `pipeline` needs."""
    method: Literal["flash", "consistency"] = "flash"
    """The target: where the teacher's solver ends, or the student itself one solver step on (LCM, arXiv 2310.04378)."""
    student: Student = Student()
    """What is trained."""
    discriminator: Discriminator = Discriminator()
    """The adversary; it exists only where a stage weighs it."""
    critic: Critic | None = None
    """What distribution matching compares the teacher with (DMD2, arXiv 2405.14867, section 4.2); None: the student
    itself stands in, as in Flash Diffusion, which costs nothing and is biased: it predicts pictures, not their mean."""
    data: Data = Data()
    """Pictures and captions."""
    conditioners: tuple[Conditioner, ...] = ()
    """What is seen beside text and noise."""
    size: tuple[int, int] = (1024, 1024)
    """Width and height of the pictures in pixels; other aspect ratios keep the area."""
    timesteps: Literal["modes", "uniform", "gaussian"] = "modes"
    """How the noise level of a batch is drawn from the grid."""
    solver: Literal["auto", "euler", "multistep"] = "auto"
    """The teacher's: auto is euler for flow models and DPM-Solver++ 2M (arXiv 2211.01095) for the others."""
    distance: Distance = "l2"
    """What the distillation loss measures; `features` needs no download, `lpips` needs `lpips_weights`."""
    lpips_weights: str | None = None
    """safetensors file with the VGG16 and the linear layers of LPIPS."""
    negative: str | None = None
    """The prompt of the unguided half; None: what the pipeline takes where it is given none."""
    guidance: float | None = None
    """The guidance at which the student is sampled, where its guidance is embedded; None: the last range's middle."""
    optimizer: Optimizer = Optimizer()
    """How the student learns."""
    records: Records = Records()
    """Checkpoints, sample grids and logs."""
    batch: int = 4
    """Pictures in one batch on each device."""
    precision: Literal["float32", "bfloat16"] | None = None
    """Of the forward passes; None: bfloat16 on a GPU, float32 on the CPU."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With several processes: replicas of the student, or FSDP2 shards of it."""
    accelerate: str | None = "exact"
    """Preset of `vivace.accelerate` for the teacher; None leaves it stock. Losses that need its gradient (the
    adversarial one, distance: features) take it from the stock blocks in 16 bit, whatever the preset."""
    seed: int = 0
    """Draws everything that is random."""

    def __post_init__(self) -> None:
        check(checked(self))

    def rolls_out(self, stage: Stage) -> bool:
        """Whether a loss of the stage asks where the teacher's solver goes."""
        return stage.distillation > 0 or (stage.adversarial > 0 and self.discriminator.real == "teacher")

    @property
    def batches(self) -> int:
        """Optimizer steps in all."""
        return sum(stage.batches for stage in self.stages)

    def computes_in(self, device: str) -> str:
        """The precision of the forward passes on a kind of device ("cuda", "cpu")."""
        return self.precision or ("bfloat16" if device == "cuda" else "float32")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and for comparing."""
        return _plain(dataclasses.asdict(self))


def check(config: DistillConfig) -> None:
    """Raise InputError for the first value that cannot be, before any model is read."""
    _check_numbers(config.to_dict())
    if not config.stages:
        raise InputError("stages is empty; give at least one, such as - {batches: 1000}")
    for index, stage in enumerate(config.stages):
        _check_stage(stage, where=f"stages[{index}]", modes=config.timesteps == "modes")
    optimizer, records = config.optimizer, config.records
    bounds = {
        "": (vars(config), {"batch": 1}),
        "optimizer.": (vars(optimizer), {"accumulate": 1, "warmup": 0, "decay": 0, "lr": 0}),
        "records.": (vars(records), {"save_every": 1, "keep": 1, "sample_every": 0}),
        "student.": (vars(config.student), {"rank": 1}),
        "discriminator.": (vars(config.discriminator), {"width": 1, "lr": 0}),
        "critic.": (vars(config.critic or Critic()), {"rank": 1, "updates": 1, "lr": 0}),
        "data.": (vars(config.data), {"window": 1, "workers": 1, "least_side": 0}),
    }
    for where, (values, least) in bounds.items():
        for name, bound in least.items():
            if values[name] < bound:
                raise InputError(f"{where}{name} is {values[name]}; it has to be {bound} or more")
    if min(config.size) < 8:
        raise InputError(f"size is {list(config.size)}; it takes width and height in pixels, such as [1024, 1024]")
    if config.accelerate is not None:
        resolve(config.accelerate)
    if config.student.kind == "lora" and not config.student.targets:
        raise InputError("student.targets is empty; give endings of module names, such as [to_q, to_k, to_v, to_out.0]")
    if config.critic is not None and not any(stage.matching for stage in config.stages):
        raise InputError("a critic serves distribution matching, which no stage weighs; set matching, or leave it out")
    times = config.discriminator.times
    if not times or not 0 <= min(times) <= max(times) <= 1000:
        raise InputError(
            f"discriminator.times is {list(times)}; it takes noise levels from 0 to 1000, such as [10, 500]"
        )
    if config.student.ema is not None and not 0 < config.student.ema < 1:
        raise InputError(f"student.ema is {config.student.ema}; it is a decay between 0 and 1, such as 0.999")
    if optimizer.clip is not None and optimizer.clip <= 0:
        raise InputError(f"optimizer.clip is {optimizer.clip}; it has to be above 0, or null for none")
    if not records.steps or min(records.steps) < 1:
        raise InputError(f"records.steps is {list(records.steps)}; it takes numbers of steps, such as [4]")
    if (config.distance == "lpips") != (config.lpips_weights is not None):
        raise InputError("distance: lpips and lpips_weights go together; without a file use distance: features")
    _check_data(config.data)
    if config.method == "consistency":
        _check_consistency(config)
    _check_conditioners(config)


def _check_conditioners(config: DistillConfig) -> None:
    records = config.records
    if config.conditioners and records.sample_every and records.prompts:
        raise InputError("with conditioners sample grids show the data's first pictures; leave records.prompts out")
    for index, one in enumerate(config.conditioners):
        if (one.join == "argument") != (one.argument is not None):
            raise InputError(f"conditioners[{index}]: join: argument and argument go together")
        try:
            json.dumps(_plain(one.options))
        except TypeError as error:
            raise InputError(
                f"conditioners[{index}].options is {one.options}; it takes text, numbers and lists of them, which "
                "checkpoints can hold"
            ) from error


def _check_data(data: Data) -> None:
    if data.kind != "builtin" and not data.path:
        raise InputError(f"data.path is missing; data of kind {data.kind} is read from there")
    if any(ratio <= 0 for ratio in data.ratios):
        raise InputError(f"data.ratios is {list(data.ratios)}; it takes width / height, such as [0.75, 1.0]")
    if data.ratios and data.kind == "builtin":
        raise InputError(
            "data.ratios is for pictures that lie somewhere; those of kind builtin are squares, leave it out"
        )


def _check_consistency(config: DistillConfig) -> None:
    """Refuse what belongs to a rollout, of which consistency distillation has one step."""
    if config.solver == "multistep":
        raise InputError("method: consistency takes one solver step, and multistep needs two; leave solver out")
    if config.discriminator.real == "teacher" and any(stage.adversarial for stage in config.stages):
        raise InputError("with method: consistency the teacher reaches no picture; set discriminator.real: data")


def _check_stage(stage: Stage, *, where: str, modes: bool) -> None:
    low, high = stage.guidance
    if stage.batches < 1 or stage.steps < 1:
        raise InputError(f"{where} has {stage.batches} batches of {stage.steps} steps; both have to be 1 or more")
    if not 0 <= low <= high:
        raise InputError(f"{where}.guidance is {list(stage.guidance)}; it takes [least, most], both 0 or more")
    if not 0 <= stage.simulated <= 1:
        raise InputError(f"{where}.simulated is {stage.simulated}; it is a share from 0 to 1")
    if min(stage.distillation, stage.matching, stage.adversarial) < 0:
        raise InputError(f"{where} has a negative weight; weights are 0 or more")
    if not any((stage.distillation, stage.matching, stage.adversarial)):
        raise InputError(f"{where} weighs nothing; set distillation, matching or adversarial above 0")
    # Other mixtures take the number of modes too: as the student's own steps, where `simulated` begins.
    if not stage.modes or min(stage.modes) < 0 or sum(stage.modes) <= 0:
        raise InputError(f"{where}.modes is {list(stage.modes)}; it takes weights of 0 or more, not all 0")
    if modes and stage.steps % len(stage.modes):
        count = len(stage.modes)
        near = max(count, round(stage.steps / count) * count)
        raise InputError(
            f"{where}.steps is {stage.steps}, which does not divide into {count} modes; the nearest that does is {near}"
        )


def _check_numbers(value: Any, *, where: str = "") -> None:
    """Refuse NaN and infinity, which would pass for a bound or two."""
    if isinstance(value, Mapping):
        for name, one in value.items():
            _check_numbers(one, where=f"{where}.{name}".lstrip("."))
    elif isinstance(value, list):
        for index, one in enumerate(value):
            _check_numbers(one, where=f"{where}[{index}]")
    elif isinstance(value, float) and not isfinite(value):
        raise InputError(f"{where} is {value}; it takes a finite number")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, tuple | list) else value
