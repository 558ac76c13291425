"""One request's run: the stock pipeline, called in this thread on a view whose module calls go to the worker."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Hashable
from functools import partial
from typing import Any

import torch

from vivace.accelerate import acceleration_of
from vivace.errors import InputError
from vivace.family import Family
from vivace.generation.generate import CALL, FPS
from vivace.inputs import arguments
from vivace.lane import Lane
from vivace.request import Request as Scope
from vivace.request import count_steps, current, open_request
from vivace.scheduler import use_scheduler
from vivace.serve.call import Axes, Call
from vivace.serve.failures import FieldError
from vivace.serve.job import Job, Preview, Progress, Result
from vivace.serve.model import Model, lane_of
from vivace.serve.prepare import Prepared
from vivace.serve.request import Request
from vivace.serve.segments import Segments
from vivace.serve.view import view
from vivace.serve.worker import Worker
from vivace.steps import Counter

DIGESTS = 32  # tensors of which one request remembers the contents' digest


class Run:
    """Runs what was prepared of a job once. One that is not `shown` tells the job nothing."""

    def __init__(self, job: Job, prepared: Prepared, *, model: Model, worker: Worker, shown: bool = True) -> None:
        self.job, self.prepared, self.model, self.worker, self.shown = job, prepared, model, worker, shown
        self._denoisers = set(model.denoisers.values())
        self._total = 0
        self._denoised = 0  # denoiser calls that were computed, if only in part
        self._batches: list[int] = []  # of these, or of each segment that a step cache computes: who shared it
        self._decode_s = 0.0
        self._first: float | None = None  # when the first denoiser call came
        self._last = 0.0  # when the last one was answered
        self._digests: OrderedDict[int, tuple[torch.Tensor, int, Hashable]] = OrderedDict()

    def __call__(self) -> Result:
        """The result. Raises what the pipeline raised, or the job's Failure."""
        request, source = self.prepared.request, self.model.source
        whole = self.model.as_class(self.prepared.pipeline)
        pipe = view(
            whole,
            send=self._send,
            lock=self.model.lock,
            device=self.model.inputs_on,
            # What was kept may have been computed in a batch.
            remembers=not request.deterministic,
            told=_told(request, whole, source.family),
        )
        if request.scheduler is not None:
            try:
                use_scheduler(pipe, request.scheduler, prediction=source.prediction)
            except InputError as error:
                raise FieldError("scheduler", str(error)) from None
        for part in pipe.components.values():
            count_steps(part)
        vars(pipe)["progress_bar"] = Counter(self._tell)
        # On the CPU, so that a seed means the same noise on every device.
        generator = torch.Generator("cpu").manual_seed(self.job.seed)
        started = time.monotonic()
        with open_request(scheduler=getattr(pipe, "scheduler", None)) as scope:
            out = pipe(**self.prepared.call, generator=generator, output_type="pil")
            hits, sample = _hits(scope, self.model), scope.sample
        self.job.check()
        pictures = tuple(out.frames[0] if hasattr(out, "frames") else out.images[:1])
        if self.shown and (request.preview_every or request.previews or not self.model.sketch.learned):
            self._learn(sample, pictures[len(pictures) // 2])
        ended = time.monotonic()
        timings = {
            "queue_s": started - self.job.created,
            "text_s": (self._first or ended) - started,
            "denoise_s": max(0.0, self._last - (self._first or ended)),
            "decode_s": self._decode_s,
            "total_s": ended - self.job.created,
        }
        acceleration = acceleration_of(self.model.pipe)
        shared = sum(self._batches) / len(self._batches) if self._batches else 0.0
        return Result(
            pictures=pictures,
            effective=self._effective(pipe, pictures),
            timings={name: round(value, 4) for name, value in timings.items()},
            calls={"denoiser": self._denoised, "requests_per_call": round(shared, 2), **hits},
            applied=tuple(acceleration.target.notes) if acceleration else (),
        )

    def _send(self, module: torch.nn.Module, method: str, kwargs: dict[str, Any]) -> Any:
        denoises = module in self._denoisers
        lane = lane_of(module) if denoises and method == "forward" else None
        if lane is not None and lane.cache is not None:
            before = len(self._batches)
            out = lane.through(self._segments(lane), kwargs)
            self._denoised += len(self._batches) > before
            return out
        self._denoised += denoises
        if not denoises:
            kwargs = kwargs if method == "forward" else _for_vae(module, kwargs)
            return self._call(method, kwargs, module=module, form=Axes()).out
        # Calls at the ends of a request, where attention is exact, go with others of their kind.
        end = lane is not None and lane.at_end
        padded = lane is None or lane.masks
        return self._call(method, kwargs, module=module, form=self.model.axes(padded=padded), part=end).out

    def _segments(self, lane: Lane) -> Segments:
        return Segments(
            lane,
            axes=self.model.axes(padded=False),
            digest=self._digest,
            layouts=self.model.layouts,
            send=partial(self._call, module=lane.denoiser),
            alone=self.job.request.deterministic,
            end=lane.at_end,
        )

    def _call(self, method: str, kwargs: dict[str, Any], *, module: torch.nn.Module, **how: Any) -> Call:
        """One call by the worker, timed and counted."""
        denoises = module in self._denoisers
        began = time.monotonic()
        if denoises and self._first is None:
            self._first = began
        call = self.worker.call(self.job, module, method, kwargs, digest=self._digest, **how)
        if denoises:
            self._batches.append(call.shared_by)
            self._last = time.monotonic()
        elif method == "decode":
            self._decode_s += time.monotonic() - began
        return call

    def _tell(self, done: int, total: int) -> None:
        self.job.check()
        if not self.shown:
            return
        self._total = total
        spent = time.monotonic() - (self._first or time.monotonic())
        self.job.tell(
            Progress(step=done, total=total, seconds_left=round(spent / done * (total - done), 3) if done else None)
        )
        if self.prepared.request.previewed(done, of=total) and (now := current()) and now.sample is not None:
            picture = self.model.sketch.draw(now.sample, size=self.prepared.size or (1, 1))
            if picture is not None:
                self.job.tell(Preview(step=done, picture=picture))

    def _learn(self, sample: torch.Tensor | None, picture: Any) -> None:
        if sample is not None and hasattr(picture, "getbands"):
            self.model.sketch.learn(sample, picture)

    def _digest(self, tensor: torch.Tensor) -> Hashable:
        """Of a tensor's contents, computed once for each tensor: on a GPU it waits for the device."""
        known = self._digests.get(id(tensor))
        # Inference tensors keep no version.
        version = 0 if tensor.is_inference() else tensor._version
        if known is not None and known[0] is tensor and known[1] == version:
            return known[2]
        raw = tensor.detach().cpu().contiguous().view(torch.uint8) if tensor.ndim else tensor.detach().cpu()
        content = raw.numpy().tobytes() if tensor.ndim else repr(raw.item()).encode()
        digest = (tuple(tensor.shape), tensor.dtype, tensor.device, hashlib.sha256(content).digest())
        self._digests[id(tensor)] = (tensor, version, digest)
        if len(self._digests) > DIGESTS:
            self._digests.popitem(last=False)
        return digest

    def _effective(self, pipe: Any, pictures: tuple[Any, ...]) -> dict[str, Any]:
        """Everything that decided the pixels, as plain values."""
        call, request = self.prepared.call, self.prepared.request
        defaults = {name: one.default for name, one in arguments(self.prepared.pipeline).items()}
        guidance = call.get(CALL["guidance"], defaults.get(CALL["guidance"]))
        found = {
            "model": self.job.model,
            "preset": self.model.preset,
            "cache": self.model.cache,
            "seed": self.job.seed,
            "steps": self._total or call.get(CALL["steps"]),
            "size": list(pictures[0].size),
            "guidance": guidance if isinstance(guidance, int | float) else None,
            "true_cfg": call.get(CALL["true_cfg"]),
            "scheduler": type(pipe.components["scheduler"]).__name__ if "scheduler" in pipe.components else None,
            "lora": dict(request.lora) or None,
            "negative": request.negative,
            "strength": request.strength,
            "frames": len(pictures) if self.model.media == "video" else None,
            "fps": (request.fps or call.get("fps") or FPS) if self.model.media == "video" else None,
            "deterministic": request.deterministic or None,
        }
        return {name: value for name, value in found.items() if value is not None}


def _hits(scope: Scope, model: Model) -> dict[str, int]:
    """Denoiser calls that the step caches computed and skipped, in whole or in part."""
    acceleration = acceleration_of(model.pipe)
    lanes = acceleration.target.lanes.values() if acceleration else ()
    counts = [scope.memo[lane.cache][2] for lane in lanes if lane.cache is not None and lane.cache in scope.memo]
    if not counts:
        return {}
    return {"computed": sum(one.computed for one in counts), "skipped": sum(one.skipped for one in counts)}


def _told(request: Request, pipe: Any, family: Family | None) -> dict[str, dict[str, Any]]:
    """What an inpaint pipeline is told of a denoiser whose latents have other channels than its first model's."""
    if request.mask is None or family is None or family.mask_channels is None:
        return {}
    denoiser, latents = family.denoisers[0], pipe.vae.config.latent_channels
    plain = getattr(pipe, denoiser).config.in_channels == latents
    return {denoiser: {"in_channels": family.mask_channels}} if plain else {}


def _for_vae(module: torch.nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a VAE's call in its own dtype, and without the generator that only a sampling decoder reads."""
    dtype = next(module.parameters()).dtype
    found = {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in kwargs.items()
    }
    if type(module).__name__ in ("AutoencoderKL", "AutoencoderTiny"):
        found.pop("generator", None)
    return found
