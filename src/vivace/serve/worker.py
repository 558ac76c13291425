"""The worker: has the calls of all requests run on a device, one after another, several as one where it can.

It has a thread for that. Where a request is alone on a CPU, its own thread does it until there is a second one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from vivace import request
from vivace.errors import InputError
from vivace.memory.decode import tiles
from vivace.serve.call import Axes, Call, Digest, Form, Unsplittable
from vivace.serve.cohort import Cohorts
from vivace.serve.failures import Failure, OutOfMemory, Unavailable
from vivace.serve.gather import Gather
from vivace.serve.job import Job

logger = logging.getLogger(__name__)

KEPT = 512  # kinds of calls that are remembered
AHEAD = 2  # batches launched on a GPU before the oldest must be done: enough to hide the launching, no more
FORGET = 600.0  # seconds after which a batch that ran out of memory is tried again: what took the room may be gone
TICK = 0.5  # seconds between two looks at the clock while nothing happens


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One call that was run, for whoever counts."""

    kind: str  # class and method: "SD3Transformer2DModel.forward"
    size: int  # requests in it
    seconds: float
    waited: float = 0.0  # of these seconds, for a GPU that was behind
    own_cpu: float = 0.0  # seconds of a processor's that a request's own thread spent on it; 0: the worker's did


class Worker:
    """Runs module calls one after another, up to `most` of one kind as one. Request threads hand them in, and wait."""

    def __init__(
        self,
        device: torch.device,
        *,
        most: int = 16,
        gather: Gather | None = None,
        watch: Callable[[Batch], None] = lambda batch: None,
    ) -> None:
        self.device = device
        self.most = most  # requests in a call
        self.sizes: Callable[[torch.nn.Module, int], int] = lambda module, size: size
        self.busy_since: float | None = None
        self.dead: BaseException | None = None  # the device's fatal error
        self.watch = watch
        self._gather = gather or Gather(sized=device.type == "cpu")
        self._pending: list[Call] = []
        self._group: list[Call] = []  # what is computed now
        self._by: Job | None = None  # in whose own thread; None: in this one
        self._cohorts = Cohorts()
        self._wake = threading.Condition()
        self._closing = False
        self._idle_since = time.monotonic()  # since when the device has nothing to do, while that is so
        self._launched: deque[Any] = deque()
        self._waited = 0.0  # seconds that the calls computed now waited for the GPU
        self._alone: set[tuple[int, str]] = set()  # module, method: what it returns cannot be told apart
        self._too_many: OrderedDict[Hashable, tuple[int, float]] = OrderedDict()  # kind -> how many, and when
        self._thread = threading.Thread(target=self._loop, name=f"vivace-{device}", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._pending)

    def stale(self, seconds: float) -> bool:
        """Whether the device has not answered for that long, or never will."""
        since = self.busy_since
        return not self._thread.is_alive() or (since is not None and time.monotonic() - since > seconds)

    def call(
        self,
        job: Job,
        module: torch.nn.Module,
        method: str,
        kwargs: dict[str, Any],
        *,
        form: Form | None,
        digest: Digest,
        compute: Callable[..., Any] | None = None,
        part: Hashable = None,
    ) -> Call:
        """Run one module call, alone or with others, and wait for it. Raises what it raised, or the job's Failure.

        `compute` stands in for the method, and `part` says which of several it is. Without a `form` it goes alone.
        """
        job.check()
        call = self._call(job, module, method, kwargs, form=form, digest=digest, compute=compute, part=part)
        with self._wake:
            if self._closing or self.dead:
                raise Unavailable("the device is not there any more")
            # Again: what was cancelled meanwhile has been withdrawn, and would wait here for good.
            job.check()
            self._gather.arrives(call)
            own = self._may_itself(call)
            if own:
                self._take([call], by=job)
            else:
                self._pending.append(call)
                self._wake.notify_all()
        if own:
            with torch.no_grad():
                self._compute()
        # Also after a cancel, where it is computed already: until that is over, the model must stay as it is.
        call.done.wait()
        if call.error is not None:
            raise call.error
        job.check()
        return call

    def _call(
        self,
        job: Job,
        module: torch.nn.Module,
        method: str,
        kwargs: dict[str, Any],
        *,
        form: Form | None,
        digest: Digest,
        compute: Callable[..., Any] | None,
        part: Hashable,
    ) -> Call:
        alone = form is None or job.request.deterministic or (id(module), method) in self._alone
        found = None if form is None or alone else form.describe(kwargs, digest=digest)
        key = (id(module), method, part, found[0]) if found else None
        # The module itself rather than its forward: it may have hooks.
        usual: Any = module if method == "forward" else getattr(module, method, None)
        return Call(
            job=job,
            module=module,
            method=method,
            compute=compute or usual,
            kwargs=kwargs,
            form=form or Axes(),
            scope=request.current(),
            key=key,
            rows=found[1] if found else 1,
        )

    def withdraw(self, job: Job, reason: BaseException | None = None) -> None:
        """End a job. A call that waits is taken back; one that runs goes on, for nobody or for others.

        A call that runs may do so for good: that its job is over is told at once, and its thread comes after it.
        """
        error = reason or job.stop
        with self._wake:
            waiting = [call for call in self._pending if call.job is job]
            self._pending = [call for call in self._pending if call.job is not job]
            computed = any(call.job is job for call in self._group)
            self._wake.notify_all()
        for call in waiting:
            call.finish(error=error)
        if computed:
            job.finish(error=error)

    def expire(self) -> None:
        """End the jobs whose time is over."""
        with self._wake:
            late = [call.job for call in (*self._pending, *self._group) if call.job.time_left() == 0]
        for job in late:
            self.withdraw(job, job.late())

    def lose(self, error: BaseException) -> Unavailable:
        """The device is gone for good; what to tell those who wait for it."""
        self.dead = error
        logger.critical("the device is lost: %s", error)
        return Unavailable("the device is lost")

    def leave(self, job: Job) -> None:
        """The job is over: nobody waits for its next call."""
        with self._wake:
            self._gather.leaves(job)
            self._cohorts.leave(job)
            self._wake.notify_all()

    def close(self, timeout: float = 10.0) -> None:
        """End the thread after the call it is at; waiting calls fail."""
        with self._wake:
            self._closing = True
            left, self._pending = self._pending, []
            self._wake.notify_all()
        for call in left:
            call.finish(error=Unavailable("the engine is closing"))
        self._thread.join(timeout)

    def _loop(self) -> None:
        with torch.no_grad():
            while True:
                with self._wake:
                    calls, hold = self._choose() if not self._group else ([], TICK)
                    if not calls:
                        if self._closing and not self._group:
                            return
                        self._wake.wait(hold)
                        continue
                    self._take(calls)
                self._compute()
                # What outlives the call would keep its tensors until the next one.
                del calls

    def _may_itself(self, call: Call) -> bool:
        """Whether a request computes its call in its own thread, which nobody else wants the device for.

        On a CPU that saves two changes of threads a call, and a second team of threads for its maths. On a GPU each
        thread that launches would have a workspace of its own.
        """
        return self.device.type == "cpu" and not self._group and not self._pending and self._gather.alone(call.job)

    def _take(self, calls: list[Call], *, by: Job | None = None) -> None:
        """The device is busy with these from now on; with `by` in that job's own thread."""
        self._pending = [call for call in self._pending if call not in calls]
        self._group, self._by = calls, by
        self.busy_since = time.monotonic()

    def _compute(self) -> None:
        """Run what was taken, and let go of the device."""
        try:
            self._run(self._group)
        finally:
            self._fail(self._group, Unavailable("the device does not answer"))  # what was answered stays so
            with self._wake:
                self._group, self._by = [], None
                self.busy_since, self._idle_since = None, time.monotonic()
                if self._pending or self._closing:
                    self._wake.notify_all()

    def _choose(self) -> tuple[list[Call], float]:
        """The calls to run now; none of them means: look again after that many seconds."""
        now, hold = time.monotonic(), TICK
        groups: dict[Hashable, list[Call]] = {}
        for call in self._pending:
            groups.setdefault(call if call.key is None else call.key, []).append(call)
        for key, calls in sorted(groups.items(), key=lambda item: -self._gather.urgency(*item, now=now)):
            most = 1 if calls[0].key is None else self._gather.size(key, most=self._most(key))
            left = self._gather.wait(key, calls, free=self._idle_since, now=now) if len(calls) < most else 0.0
            if left <= 0:
                size = self.sizes(calls[0].module, min(most, len(calls)))
                # The request that came first is done first: taking turns would make all of them late.
                calls.sort(key=lambda call: (-call.job.request.priority, call.job.created))
                return calls[:size], 0.0
            hold = min(hold, left)
        return [], hold

    def _most(self, key: Hashable) -> int:
        """How many calls of a kind may go together: half of those that were too much for the memory lately."""
        many, when = self._too_many.get(key, (0, 0.0))
        return max(1, many // 2) if many and time.monotonic() - when < FORGET else self.most

    def _run(self, calls: list[Call]) -> None:
        """Answer the calls; whatever goes wrong ends with them."""
        started, spent, self._waited = time.monotonic(), time.thread_time(), 0.0
        error = self._try(calls)
        if error is None:
            self._record(calls, time.monotonic() - started, time.thread_time() - spent)
        elif fatal(error):
            self._fail(calls, self.lose(error))
        elif len(calls) > 1:
            if out_of_memory(error):
                self._too_many[calls[0].key] = (len(calls), time.monotonic())
                if len(self._too_many) > KEPT:
                    self._too_many.popitem(last=False)
            # One may be wrong, or all may be too much at once: each by itself fails for itself.
            told = {"facts": {"jobs": [call.job.id for call in calls]}}
            logger.warning("a batch of %d failed (%s); trying one by one", len(calls), type(error).__name__, extra=told)
            self._free(error)
            for call in calls:
                self._run([call])
        elif out_of_memory(error):
            self._free(error)
            again = self._tiled(calls[0])
            if again is not None:
                self._fail(calls, OutOfMemory("the device has too little memory") if out_of_memory(again) else again)
        else:
            self._fail(calls, error)

    def _try(self, calls: list[Call]) -> BaseException | None:
        """Compute and hand out; the error instead where there is one."""
        first, started = calls[0], time.monotonic()
        try:
            if len(calls) == 1:
                with request.within(first.scope):
                    outs = [first.compute(**first.kwargs)]
            else:
                with self._wake:
                    cohort = self._cohorts.of(calls)
                rows = [call.rows for call in calls]
                with request.within(cohort.at(first.scope)):
                    joint = first.compute(**first.form.join([call.kwargs for call in calls], rows=rows, cat=cohort.cat))
                outs = first.form.split(joint, rows=rows)
            self._pace()
        except Unsplittable as error:
            self._alone.add((id(first.module), first.method))
            return error
        except Exception as error:
            return error.with_traceback(None)
        now = time.monotonic()
        with self._wake:
            self._gather.ran(calls, seconds=now - started, now=now)
        for call, out in zip(calls, outs, strict=True):
            call.shared_by = len(calls)
            call.finish(out)
        return None

    def _tiled(self, call: Call) -> BaseException | None:
        """Once more in tiles, where the module can; the error that remains."""
        if call.method not in ("encode", "decode") or not tiles(call.module):
            return OutOfMemory("the device has too little memory for it")
        module: Any = call.module
        before = module.use_tiling
        module.enable_tiling()
        try:
            return self._try([call])
        finally:
            module.use_tiling = before

    def _pace(self) -> None:
        """Do not run further ahead of a GPU than hides the launching: what waits can still be joined and cancelled."""
        if self.device.type != "cuda":
            return
        event = torch.cuda.Event()
        event.record()
        self._launched.append(event)
        if len(self._launched) >= AHEAD:
            began = time.monotonic()
            self._launched.popleft().synchronize()
            self._waited += time.monotonic() - began

    def _record(self, calls: list[Call], seconds: float, cpu: float) -> None:
        kind = f"{type(calls[0].module).__name__}.{calls[0].method}"
        with suppress(Exception):  # a counter that fails is no reason to lose a picture
            own = {} if self._by is None else {"own_cpu": cpu}
            self.watch(Batch(kind=kind, size=len(calls), seconds=seconds, waited=self._waited, **own))

    def _fail(self, calls: list[Call], error: BaseException) -> None:
        for call in calls:
            call.finish(error=error)

    def _free(self, error: BaseException) -> None:
        error.__traceback__ = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the device or the host."""
    error = _beneath(error)
    known = isinstance(error, torch.OutOfMemoryError | MemoryError | OutOfMemory)
    return known or "can't allocate memory" in str(error)


def fatal(error: BaseException) -> bool:
    """Whether a CUDA error leaves the process without its device."""
    error = _beneath(error)
    if isinstance(error, Failure | InputError) or out_of_memory(error):
        return False
    return isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)


def _beneath(error: BaseException) -> BaseException:
    """What an error was before it was worded as a mistake in what was asked for, as those of loaders are."""
    while isinstance(error, InputError) and error.__cause__ is not None:
        error = error.__cause__
    return error
