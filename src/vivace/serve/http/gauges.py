"""What /metrics tells, for Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from vivace.serve.worker import Batch

if TYPE_CHECKING:
    from vivace.serve.job import Job
    from vivace.serve.studio import Studio

LATENCIES = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
CALLS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
SIZES = (1, 2, 4, 8, 16, 32)


class Gauges:
    """The counters of one server; labels have few values: routes, models, outcomes."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        made: dict[str, Any] = {"registry": self.registry}
        self._queue = Gauge("vivace_queue_depth", "Requests that wait", **made)
        self._running = Gauge("vivace_running", "Requests that run", **made)
        self._ready = Gauge("vivace_ready", "1 while requests are taken", **made)
        self._memory = Gauge("vivace_gpu_memory_bytes", "Allocated by torch", ["device"], **made)
        self._loaded = Gauge("vivace_model_bytes", "Weights on the device; 0: not loaded", ["model"], **made)
        self._calls = Histogram("vivace_call_seconds", "One module call", ["kind"], buckets=CALLS, **made)
        self._sizes = Histogram("vivace_call_requests", "Requests in one call", ["kind"], buckets=SIZES, **made)
        self._waits = Histogram("vivace_queue_seconds", "From submission to start", buckets=LATENCIES, **made)
        self._steps = Histogram("vivace_step_seconds", "One denoising step of one request", buckets=CALLS, **made)
        self._jobs = Histogram(
            "vivace_job_seconds", "From submission to result", ["model", "outcome"], buckets=LATENCIES, **made
        )
        self._cached = Counter("vivace_cached_calls", "Denoiser calls of requests with a step cache", ["kind"], **made)
        self._http = Counter("vivace_http_requests", "HTTP requests", ["route", "status"], **made)
        self._http_seconds = Histogram("vivace_http_seconds", "HTTP requests", ["route"], buckets=LATENCIES, **made)

    def batch(self, batch: Batch) -> None:
        """One module call was run."""
        self._calls.labels(batch.kind).observe(batch.seconds)
        self._sizes.labels(batch.kind).observe(batch.size)

    def job(self, job: Job) -> None:
        """One job is over."""
        ended = job.finished or job.created
        self._jobs.labels(job.model, job.status).observe(ended - job.created)
        if job.started is not None:
            self._waits.observe(job.started - job.created)
        if job.status == "done":
            result = job.result()
            steps = max(1, int(result.effective.get("steps") or 1))
            self._steps.observe(result.timings["denoise_s"] / steps)
            for kind in ("computed", "skipped"):
                self._cached.labels(kind).inc(result.calls.get(kind, 0))

    def http(self, route: str, status: int, seconds: float) -> None:
        """One HTTP request was answered."""
        self._http.labels(route, str(status)).inc()
        self._http_seconds.labels(route).observe(seconds)

    def text(self, engine: Studio) -> bytes:
        """The page."""
        self._queue.set(engine.queued)
        self._running.set(engine.running)
        self._ready.set(engine.health().ready)
        for alias, model in engine.models.items():
            self._loaded.labels(alias).set(model.nbytes)
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            self._memory.labels(f"cuda:{index}").set(torch.cuda.memory_allocated(index))
        return generate_latest(self.registry)
