"""An endless stream of batches out of shards or folders: shuffled, filtered, bucketed, and resumable to the sample."""

from __future__ import annotations

import logging
import random
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from vivace.distill.config import Data
from vivace.distill.data.sample import Batch, Place, Refused, Sample, bucket, collate, parse
from vivace.errors import InputError

logger = logging.getLogger(__name__)

NAMED = 20  # broken samples that are named in the log; all are counted


class Source(Protocol):
    """Where samples are kept."""

    def shards(self) -> list[str]: ...

    def places(self, shard: str) -> list[Place]: ...

    def problem(self, shard: str) -> str | None: ...

    def read(self, place: Place) -> Mapping[str, bytes]: ...


class Stream:
    """Batches for one of `world` processes. The order is a function of the seed and the epoch alone."""

    def __init__(
        self,
        source: Source,
        data: Data,
        *,
        sizes: list[tuple[int, int]],
        batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        needs: Iterable[str] = (),
    ) -> None:
        self.source, self.data, self.sizes, self.batch = source, data, sizes, batch
        self.seed, self.rank, self.world = seed, rank, world
        self.needs = tuple(needs)  # further pictures that every sample has to have
        self.epoch, self.position = 0, 0  # of the next sample to take
        self.skipped: Counter[str] = Counter()
        self.broken: set[str] = set()  # shards, each counted once
        self.taken = 0  # in this epoch, of those that were kept
        self.pending: dict[tuple[int, int], list[tuple[Place, Sample]]] = {}
        self._samples: Iterator[tuple[Place, Sample]] | None = None

    def __next__(self) -> Batch:
        """The next batch: pictures of one bucket. Raises InputError when a whole epoch leaves nothing."""
        if self._samples is None:
            self._samples = self._endless()
        while True:
            place, sample = next(self._samples)
            size = bucket(sample.picture.size, self.sizes)
            waiting = self.pending.setdefault(size, [])
            waiting.append((place, sample))
            if len(waiting) == self.batch:
                return collate([sample for _, sample in self.pending.pop(size)], size)

    def state(self) -> dict[str, Any]:
        """Where the stream stands, as JSON values."""
        waiting = [list(place) for entries in self.pending.values() for place, _ in entries]
        return {
            "epoch": self.epoch,
            "position": self.position,
            "taken": self.taken,
            "pending": waiting,
            "skipped": dict(self.skipped),
            "broken": sorted(self.broken),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go to where `state` was taken."""
        self.epoch, self.position, self.taken = state["epoch"], state["position"], state["taken"]
        self.skipped, self.broken = Counter(state["skipped"]), set(state["broken"])
        self.pending = {}
        for place in (Place(*entry) for entry in state["pending"]):
            try:
                sample = self._read(place)
            except Refused as refused:
                self._skip(place, refused)
                continue
            self.pending.setdefault(bucket(sample.picture.size, self.sizes), []).append((place, sample))
        self._samples = None

    def _endless(self) -> Iterator[tuple[Place, Sample]]:
        pool = ThreadPoolExecutor(max(1, self.data.workers))
        try:
            while True:
                yield from self._epoch(pool)
                if not self.taken:
                    reasons = ", ".join(f"{reason}: {count}" for reason, count in self.skipped.most_common())
                    raise InputError(
                        f"no sample is left of {self.position} in {self.data.path} ({reasons or 'it is empty'}); "
                        "check data.path, data.captions and the filters"
                    )
                self.epoch, self.position, self.taken = self.epoch + 1, 0, 0
        finally:
            # The garbage collector may come here out of `threading` itself, whose lock a join would wait for, for ever.
            pool.shutdown(wait=False, cancel_futures=True)

    def _epoch(self, pool: ThreadPoolExecutor) -> Iterator[tuple[Place, Sample]]:
        ahead: deque[tuple[Place, Future[Sample]]] = deque()
        places = self._places(self.epoch)
        for _ in range(self.position):
            next(places, None)
        while True:
            while len(ahead) < 4 * max(1, self.data.workers) and (place := next(places, None)) is not None:
                ahead.append((place, pool.submit(self._read, place)))
            if not ahead:
                return
            place, future = ahead.popleft()
            self.position += 1
            try:
                sample = future.result()
            except Refused as refused:
                self._skip(place, refused)
                continue
            self.taken += 1
            yield place, sample

    def _read(self, place: Place) -> Sample:
        return parse(self.source.read(place), self.data, needs=self.needs)

    def _skip(self, place: Place, refused: Refused) -> None:
        self.skipped[refused.reason] += 1
        if refused.broken and self.skipped[refused.reason] <= NAMED:
            logger.warning("%s in %s is skipped: %s", place.name, place.shard, refused.reason)

    def _places(self, epoch: int) -> Iterator[Place]:
        """This process's samples of an epoch: shards in random order, mixed with their neighbours."""
        order = random.Random(f"{self.seed}/{epoch}")
        shards = self.source.shards()
        order.shuffle(shards := list(shards))
        # With a shard for everyone nobody reads another's; else all read all and take turns.
        apart = len(shards) >= self.world
        own = shards[self.rank :: self.world] if apart else shards
        for first in range(0, len(own), self.data.window):
            places = [place for shard in own[first : first + self.data.window] for place in self._places_in(shard)]
            random.Random(f"{self.seed}/{epoch}/{first}").shuffle(places)
            yield from places if apart else places[self.rank :: self.world]

    def _places_in(self, shard: str) -> list[Place]:
        """What a shard holds, as far as it can be read; what is wrong with it is counted and named once."""
        places, problem = self.source.places(shard), self.source.problem(shard)
        if problem is not None and shard not in self.broken:
            self.broken.add(shard)
            self.skipped[problem] += 1
            logger.warning("%s: %s; %d samples of it are used", shard, problem, len(places))
        return places
