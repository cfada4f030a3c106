"""The server's engine: one thread owns the devices, and runs samples of many requests in turn and in batches.

Shapes: T Y X latent grid, C latent channels, F frames, H W pixels.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np

from dit_jax.config import UserError
from dit_jax.sampling.solvers import SOLVERS, Renoise, UniPCState
from infer.buckets import Buckets
from infer.denoising import Denoising
from infer.pipeline import NOT_FINITE, Pipeline
from infer.request import Job, joined
from infer.tickets import OUTCOMES, Progress, QueueFullError, Sample, StoppedError, Ticket

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How samples share the devices.

    window  seconds that a sample waits for others to share its batch
    active  batches that take turns, segment by segment
    queue   samples that may wait
    """

    window: float = 0.02
    active: int = 2
    queue: int = 64


@dataclass(kw_only=True, eq=False)
class Batch:
    """Samples that run together: `tickets` are those of the run's first rows, the others repeat the first."""

    tickets: list[Ticket]
    run: Denoising

    @property
    def wanted(self) -> bool:
        return not all(ticket.over for ticket in self.tickets)


class Engine:
    """`submit` a ticket and wait for its `result`; `start` and `stop` the thread that serves them.

    observe  is told of the size of each `batch`, how each sample ended (an outcome of OUTCOMES) and of its seconds by
             stage (`queue`, `text`, `denoise`, `decode`)
    """

    def __init__(
        self,
        pipelines: Mapping[str, Pipeline],
        buckets: Buckets,
        options: EngineOptions = EngineOptions(),
        observe: Callable[[str, float], None] = lambda name, value: None,
    ):
        self.pipelines, self.buckets, self.options, self.observe = pipelines, buckets, options, observe
        self._changed = threading.Condition(threading.RLock())
        self._waiting: deque[Ticket] = deque()
        self._running: deque[Batch] = deque()
        self._finished: deque[Batch] = deque()
        self._busy = 0
        self._stopping = False
        self._mean_seconds = 1.0
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        """Begins to serve."""
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Samples whose turn has not come."""
        with self._changed:
            return sum(not ticket.over for ticket in self._waiting)

    @property
    def running(self) -> int:
        """Samples that are being made."""
        with self._changed:
            return self._busy + sum(len(batch.tickets) for batch in (*self._running, *self._finished))

    def submit(self, tickets: Sequence[Ticket], limited: bool = True) -> None:
        """Takes all of these or none: QueueFullError where too many wait, StoppedError while the engine stops."""
        with self._changed:
            if self._stopping:
                raise StoppedError("the server is stopping")
            if limited:
                self.check_room(len(tickets))
            self._waiting.extend(tickets)
            self._changed.notify_all()
        for ticket in tickets:
            ticket.result.add_done_callback(partial(self._over, ticket))

    def _over(self, ticket: Ticket, result: Future[Sample]) -> None:
        error = result.exception()
        self.observe(OUTCOMES.get(type(error), "failed"), 1)
        for stage, seconds in ticket.seconds.items():
            self.observe(stage, seconds)

    def check_room(self, count: int) -> None:
        """QueueFullError where so many samples more may not wait."""
        waiting = self.waiting
        if waiting + count > self.options.queue:
            raise QueueFullError(waiting, max(1.0, self._mean_seconds * waiting))

    def stop(self, patience: float) -> bool:
        """Takes nothing new, and waits for what runs; after `patience` seconds the rest ends with StoppedError.

        Returns whether all was finished. What had not begun ends at once.
        """
        with self._changed:
            self._stopping = True
            for ticket in self._waiting:
                ticket.end(StoppedError("the server is stopping"))
            self._waiting.clear()
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(patience)
        with self._changed:
            left = [ticket for batch in (*self._running, *self._finished) for ticket in batch.tickets]
            self._running.clear()
            self._finished.clear()
        for ticket in left:
            ticket.end(StoppedError("the server is stopping"))
        return not left and not self._thread.is_alive()

    def _work(self) -> None:
        while (turn := self._next()) is not None:
            turn()
            with self._changed:
                self._busy = 0

    def _next(self) -> Callable[[], None] | None:
        """What comes next: what is nearly done, then what may begin, then the batch that has waited longest."""
        with self._changed:
            while True:
                if self._finished:
                    return self._take(self._decode, self._finished.popleft())
                group, wait = self._group() if len(self._running) < self.options.active else ([], None)
                if group:
                    self._busy = len(group)
                    return partial(self._begin, group)
                if self._running:
                    return self._take(self._advance, self._running.popleft())
                if self._stopping:
                    return None
                self._changed.wait(wait)

    def _take(self, turn: Callable[[Batch], None], batch: Batch) -> Callable[[], None]:
        self._busy = len(batch.tickets)
        return partial(turn, batch)

    def _group(self) -> tuple[list[Ticket], float | None]:
        """Samples that may begin together; if there are none yet, the seconds until some will."""
        self._waiting = deque(ticket for ticket in self._waiting if not ticket.over)
        groups: dict[Any, list[Ticket]] = {}
        for ticket in self._waiting:
            groups.setdefault(id(ticket) if ticket.alone else ticket.key, []).append(ticket)
        waits = []
        for tickets in groups.values():
            most = 1 if tickets[0].alone else self.buckets[tickets[0].model].batches[-1]
            left = tickets[0].asked + self.options.window - time.perf_counter()
            if len(tickets) >= most or left <= 0:
                for ticket in tickets[:most]:
                    self._waiting.remove(ticket)
                return tickets[:most], None
            waits.append(left)
        return [], min(waits, default=None)

    def _begin(self, tickets: list[Ticket]) -> None:
        began = time.perf_counter()
        for ticket in tickets:
            self._note(ticket, "queue", began - ticket.asked)
        with self._failing(tickets):
            pipe, buckets = self.pipelines[tickets[0].model], self.buckets[tickets[0].model]
            rows = _padded(range(len(tickets)), buckets.batch(len(tickets)))
            run = Denoising(pipe, joined([tickets[row].job for row in rows]))
            self.observe("batch", len(tickets))
            self._spent(tickets, "text", began)
            batch = Batch(tickets=tickets, run=run)
            self._tell(batch, None, 1.0)
            self._running.append(batch)

    def _advance(self, batch: Batch) -> None:
        if not batch.wanted:
            return
        with self._failing(batch.tickets):
            began = time.perf_counter()
            for part in self._agreeing(batch):
                before = np.asarray(part.run.carry.latents) if _previews(part) else None
                sigma = part.run.sigma
                part.run.advance()
                jax.block_until_ready(part.run.carry.latents)
                self._spent(part.tickets, "denoise", began)
                began = time.perf_counter()
                self._tell(part, before, sigma)
                (self._finished if part.run.finished else self._running).append(part)

    def _agreeing(self, batch: Batch) -> list[Batch]:
        """The batch, or batches of those of its samples that want the same of the next segment."""
        groups = batch.run.agreeing()
        if len(groups) == 1:
            return [batch]
        buckets, parts = self.buckets[batch.tickets[0].model], []
        for rows in groups:
            live = [row for row in rows if row < len(batch.tickets)]
            if live:
                run = batch.run.of(_padded(live, buckets.batch(len(live))))
                parts.append(replace(batch, tickets=[batch.tickets[row] for row in live], run=run))
        return parts

    def _tell(self, batch: Batch, before: np.ndarray | None, sigma: float) -> None:
        run, steps = batch.run, batch.run.job.steps
        clean = None if before is None or run.finished else _clean(run, before, sigma)
        for row, ticket in enumerate(batch.tickets):
            if not ticket.over:
                shown = run.pipe.preview(clean[row, 0]) if ticket.previews and clean is not None else None
                ticket.told(Progress(done=run.done, steps=steps, preview=shown))

    def _decode(self, batch: Batch) -> None:
        if not batch.wanted:
            return
        began = time.perf_counter()
        with self._failing(batch.tickets):
            latents, job, pipe = batch.run.final(), batch.run.job, batch.run.pipe
            frames, notes = _decoded(pipe, job, latents)
            self._spent(batch.tickets, "decode", began)
            for row, (ticket, metadata) in enumerate(zip(batch.tickets, pipe.metadata(job), strict=False)):
                if not np.isfinite(latents[row]).all():
                    ticket.end(UserError(NOT_FINITE))
                    continue
                total = time.perf_counter() - ticket.asked
                self._mean_seconds += 0.1 * (total - self._mean_seconds)
                ticket.end(
                    Sample(
                        frames=frames[row] if frames[row].ndim == 4 else frames[row][None],
                        metadata=metadata,
                        fps=pipe.defaults.fps,
                        seconds={name: round(value, 4) for name, value in ticket.seconds.items()},
                        batch=len(batch.tickets),
                        notes=notes,
                    )
                )

    def _spent(self, tickets: Sequence[Ticket], stage: str, began: float) -> None:
        seconds = time.perf_counter() - began
        for ticket in tickets:
            self._note(ticket, stage, seconds)

    def _note(self, ticket: Ticket, stage: str, seconds: float) -> None:
        ticket.seconds[stage] = ticket.seconds.get(stage, 0.0) + seconds

    @contextmanager
    def _failing(self, tickets: Sequence[Ticket]) -> Iterator[None]:
        """What goes wrong inside ends a lone sample; of several each is tried again alone, so that one does not fail
        all."""
        try:
            yield
        except Exception as error:
            self._failed(tickets, error)

    def _failed(self, tickets: Sequence[Ticket], error: Exception) -> None:
        if len(tickets) == 1:
            if not isinstance(error, UserError):
                logger.error("a sample failed", exc_info=error)
            tickets[0].end(error)
            return
        with self._changed:
            for ticket in reversed(tickets):
                ticket.alone = True
                self._waiting.appendleft(ticket)


def _padded(rows: Sequence[int], count: int) -> list[int]:
    return [*rows, *[rows[0]] * (count - len(rows))]


def _previews(batch: Batch) -> bool:
    return not isinstance(SOLVERS[batch.run.job.solver], Renoise) and any(
        ticket.previews and not ticket.over for ticket in batch.tickets
    )


def _clean(run: Denoising, before: np.ndarray, sigma: float) -> np.ndarray:
    """What the latents [B, T, Y, X, C] seem to become: UniPC's own prediction, or straight on from the segment."""
    if isinstance(run.carry.solver, UniPCState):
        return np.asarray(run.carry.solver.clean)
    after = np.asarray(run.carry.latents)
    return after - run.sigma * (after - before) / (run.sigma - sigma)


def _decoded(pipe: Pipeline, job: Job, latents: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """Frames of every sample; in tiles, one sample at a time, where all at once take more memory than there is."""
    try:
        return pipe.decode(job, latents).frames, ()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
    logger.warning("decoding %d samples of %dx%d ran out of memory: in tiles now", len(latents), *job.size)
    one = [pipe.decode(job.single(row), latents[row : row + 1], tiled=True).frames for row in range(len(latents))]
    return np.concatenate(one), ("decoded in tiles, since whole it takes more memory than there is",)
