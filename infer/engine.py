"""The server's engine: one thread owns the devices, and runs samples of many requests in turn and in batches.

Shapes: T Y X latent grid, C latent channels, F frames, H W pixels.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from dit_jax.config import UserError
from infer.buckets import Buckets
from infer.engine_batch import Batch, Decoding, check_memory
from infer.pipeline import NOT_FINITE, Pipeline
from infer.tickets import OUTCOMES, CancelledError, Progress, QueueFullError, Sample, StoppedError, Ticket

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


class Engine:
    """`submit` a ticket and wait for its `result`; `start` and `stop` the thread that serves them.

    That thread alone gives the devices work. While they are busy with a segment it encodes the text of samples that
    wait; frames leave them in another thread, while the next segment runs.

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
        self._changed, self._giving_up = threading.Condition(threading.RLock()), threading.Lock()
        self._waiting: deque[Ticket] = deque()
        self._running: deque[Batch] = deque()
        self._finished: deque[Batch] = deque()
        self._decoding: list[Decoding] = []
        self._too_large: deque[Decoding] = deque()
        self._in_hand: list[Ticket] = []
        self._deadline = math.inf
        self._busy_seconds, self._made = 0.0, 0
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._fetcher = ThreadPoolExecutor(1, "frames")

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
            return sum(not ticket.over for ticket in self._begun())

    def _begun(self) -> list[Ticket]:
        decoding = [one.batch for one in (*self._decoding, *self._too_large)]
        batches = (*self._running, *self._finished, *decoding)
        return list(dict.fromkeys([*self._in_hand, *(ticket for batch in batches for ticket in batch.tickets)]))

    @property
    def _stopping(self) -> bool:
        return self._deadline < math.inf

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
        with self._changed, contextlib.suppress(ValueError):
            self._waiting.remove(ticket)
        kind = CancelledError if result.cancelled() else type(result.exception())
        self.observe(OUTCOMES.get(kind, "failed"), 1)
        for stage, seconds in dict(ticket.seconds).items():
            self.observe(stage, seconds)

    def check_room(self, count: int) -> None:
        """QueueFullError where so many samples more may not wait now, UserError where they never may."""
        waiting, most = self.waiting, self.options.queue
        if count > most:
            raise UserError(
                f"{count} samples were asked for: expected at most {most}, as many as may wait; ask for fewer"
            )
        if waiting + count > most:
            seconds = self._busy_seconds / self._made if self._made else 1.0
            raise QueueFullError(waiting, max(1.0, seconds * waiting))

    def stop(self, patience: float) -> bool:
        """Takes nothing new, and waits for what runs; after `patience` seconds the rest ends with StoppedError.

        Returns whether all was finished. What had not begun ends at once. A second call does not wait longer than the
        first would.
        """
        with self._giving_up:
            with self._changed:
                waiting = [] if self._stopping else list(self._waiting)
                self._deadline = min(self._deadline, time.monotonic() + patience)
                if waiting:
                    self._waiting.clear()
                self._changed.notify_all()
            for ticket in waiting:  # whoever is told may take his time: not under the lock that the engine needs
                ticket.end(StoppedError("the server is stopping"))
        if self._thread.is_alive():
            self._thread.join(max(0.0, self._deadline - time.monotonic()))
        with self._changed:
            left = [ticket for ticket in (*self._begun(), *self._waiting) if not ticket.over]
            for rest in (self._waiting, self._running, self._finished, self._too_large):
                rest.clear()
        for ticket in left:
            ticket.end(StoppedError("the server is stopping"))
        self._fetcher.shutdown(wait=False)
        return not left and not self._thread.is_alive()

    def _work(self) -> None:
        while (turn := self._next()) is not None:
            began = time.perf_counter()
            turn()
            with self._changed:
                self._in_hand = []
                self._busy_seconds += time.perf_counter() - began

    def _next(self) -> Callable[[], None] | None:
        """What comes next: what is nearly done, then what may begin, then the batch that has waited longest."""
        with self._changed:
            while time.monotonic() < self._deadline:
                if self._too_large:
                    decoding = self._too_large.popleft()
                    return self._take(self._decode_apart, decoding, decoding.batch.tickets)
                if self._finished:
                    batch = self._finished.popleft()
                    return self._take(self._decode, batch, batch.tickets)
                group, wait = self._group() if self._may_begin() else ([], None)
                if group:
                    return self._take(self._begin, group, group)
                if self._running:
                    batch = self._running.popleft()
                    return self._take(self._advance, batch, batch.tickets)
                if self._stopping and not self._decoding:
                    return None
                self._changed.wait(wait)
            return None

    def _may_begin(self) -> bool:
        """Whether fewer batches are under way than may be; parts of a torn one count as one."""
        most = self.options.active
        return len({id(batch.begun) for batch in self._running}) < most and len(self._decoding) < most

    def _take(self, turn: Callable[[Any], None], what: Any, tickets: list[Ticket]) -> Callable[[], None]:
        self._in_hand = tickets
        return partial(turn, what)

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
            for ticket in tickets:  # before any work, so that what kills the process is known to have begun
                if not ticket.over:
                    ticket.told(Progress(done=0, steps=ticket.job.steps))
            batch = Batch.of(tickets, self.pipelines[tickets[0].model], self.buckets[tickets[0].model])
            self.observe("batch", len(tickets))
            self._spent(tickets, "text", began)
            self._running.append(batch)

    def _advance(self, batch: Batch) -> None:
        if not batch.wanted:
            return
        try:
            parts = batch.agreeing(self.buckets[batch.tickets[0].model])
        except Exception as error:
            self._failed(batch.tickets, error)
            return
        for part in parts:
            with self._failing(part.tickets):
                began = time.perf_counter()
                before = part.seen()
                part.run.advance()
                self._encode_ahead()
                jax.block_until_ready(part.run.carry.latents)
                self._spent(part.tickets, "denoise", began)
                part.tell(before)
                (self._finished if part.run.finished else self._running).append(part)

    def _encode_ahead(self) -> None:
        """Encodes the text of the sample that has waited longest without; if that fails, its turn will tell."""
        with self._changed:
            ticket = next((one for one in self._waiting if not one.encoded and not one.over), None)
        if ticket is not None:
            ticket.encoded, began = True, time.perf_counter()
            with contextlib.suppress(Exception):
                self.pipelines[ticket.model].encode_ahead(ticket.job)
            self._spent([ticket], "text", began)

    def _decode(self, batch: Batch) -> None:
        if not batch.wanted:
            return
        with self._failing(batch.tickets):
            run = batch.run
            decoding = Decoding(batch=batch, latents=run.final(), began=time.perf_counter())
            try:
                video = run.pipe.decoding(run.job, decoding.latents)
            except jax.errors.JaxRuntimeError as error:
                check_memory(error)
                self._too_large.append(decoding)
                return
            with self._changed:
                self._decoding.append(decoding)
            self._fetcher.submit(self._fetch, decoding, video)

    def _fetch(self, decoding: Decoding, video: jax.Array) -> None:
        """Waits for the frames of a batch; in a thread of its own."""
        batch = decoding.batch
        try:
            self._end(decoding, batch.run.pipe.frames(video), ())
        except Exception as error:
            try:
                check_memory(error)
                self._too_large.append(decoding)
            except Exception as other:
                self._failed(batch.tickets, other)
        finally:
            with self._changed:
                self._decoding.remove(decoding)
                self._changed.notify_all()

    def _decode_apart(self, decoding: Decoding) -> None:
        """Decodes one sample at a time, in tiles if need be, as all at once take more memory than there is."""
        batch, run = decoding.batch, decoding.batch.run
        logger.warning("decoding %d samples of %dx%d ran out of memory: apart now", len(batch.tickets), *run.job.size)
        with self._failing(batch.tickets):
            frames, how = decoding.apart()
            self._end(decoding, frames, (f"decoded {how}, since at once it takes more memory than there is",))

    def _end(self, decoding: Decoding, frames: np.ndarray, notes: tuple[str, ...]) -> None:
        batch, latents = decoding.batch, decoding.latents
        run = batch.run
        self._spent(batch.tickets, "decode", decoding.began)
        self._made += len(batch.tickets)
        for row, (ticket, metadata) in enumerate(zip(batch.tickets, run.pipe.metadata(run.job), strict=False)):
            if not np.isfinite(latents[row]).all():
                ticket.end(UserError(NOT_FINITE))
                continue
            ticket.end(
                Sample(
                    frames=frames[row] if frames[row].ndim == 4 else frames[row][None],
                    metadata=metadata,
                    fps=run.pipe.defaults.fps,
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

    @contextlib.contextmanager
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
        logger.warning("a batch of %d samples failed: each alone now", len(tickets), exc_info=error)
        with self._changed:
            for ticket in reversed(tickets):
                ticket.alone = True
                if not ticket.over:
                    self._waiting.appendleft(ticket)
