"""What the server's engine runs: samples of several requests in one batch, and how they part.

Shapes: B samples, T Y X latent grid, C latent channels, F frames, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import numpy as np

from dit_jax.sampling.solvers import SOLVERS, Renoise, UniPCState
from infer.buckets import ModelBuckets
from infer.denoising import Denoising
from infer.pipeline import Pipeline
from infer.request import Job, joined
from infer.tickets import Progress, Ticket


class Seen(NamedTuple):
    """Latents [B, T, Y, X, C] before a segment, and their noise level."""

    latents: np.ndarray
    sigma: float


@dataclass(kw_only=True, eq=False)
class Batch:
    """Samples that run together: `tickets` are those of the run's first rows, the others repeat the first.

    begun  the same in all batches that one was torn into
    """

    tickets: list[Ticket]
    run: Denoising
    begun: object = field(default_factory=object)

    @classmethod
    def of(cls, tickets: list[Ticket], pipe: Pipeline, buckets: ModelBuckets) -> Batch:
        """These samples at their first step, in the smallest batch that holds them."""
        rows = _padded(range(len(tickets)), buckets.batch(len(tickets)))
        return cls(tickets=tickets, run=Denoising(pipe, joined([tickets[row].job for row in rows])))

    @property
    def wanted(self) -> bool:
        """Whether anybody still waits for one of them."""
        return not all(ticket.over for ticket in self.tickets)

    def agreeing(self, buckets: ModelBuckets) -> list[Batch]:
        """The batch, or batches of those of its samples that want the same of the next segment."""
        groups = self.run.agreeing()
        if len(groups) == 1:
            return [self]
        parts = []
        for rows in groups:
            live = [row for row in rows if row < len(self.tickets)]
            if live:
                run = self.run.of(_padded(live, buckets.batch(len(live))))
                parts.append(replace(self, tickets=[self.tickets[row] for row in live], run=run))
        return parts

    def seen(self) -> Seen | None:
        """What previews of the next segment start from, where somebody wants them."""
        run = self.run
        if isinstance(SOLVERS[run.job.solver], Renoise):
            return None
        wanted = any(ticket.previews and not ticket.over for ticket in self.tickets)
        return Seen(np.asarray(run.carry.latents), run.sigma) if wanted else None

    def tell(self, before: Seen | None) -> None:
        """Tells every sample how far it is; with what was before the last segment, also what it may become."""
        run, steps = self.run, self.run.job.steps
        clean = None if before is None or run.finished else _telling(run, _clean(run, before))
        for row, ticket in enumerate(self.tickets):
            if not ticket.over:
                shown = run.pipe.preview(clean[row]) if ticket.previews and clean is not None else None
                ticket.told(Progress(done=run.done, steps=steps, preview=shown))


@dataclass(kw_only=True, eq=False)
class Decoding:
    """A batch with its final latents, whose frames are on their way since `began`."""

    batch: Batch
    latents: np.ndarray
    began: float

    def apart(self) -> tuple[np.ndarray, str]:
        """Frames of one sample after the other, in tiles if need be, and which of both it was."""
        run = self.batch.run
        parts = [
            _decoded_alone(run.pipe, run.job.single(row), self.latents[row : row + 1])
            for row in range(len(self.batch.tickets))
        ]
        how = "in tiles" if any(tiled for _, tiled in parts) else "one by one"
        return np.concatenate([frames for frames, _ in parts]), how


def check_memory(error: Exception) -> None:
    """Raises what is no lack of memory."""
    if not isinstance(error, jax.errors.JaxRuntimeError) or "RESOURCE_EXHAUSTED" not in str(error):
        raise error


def _decoded_alone(pipe: Pipeline, job: Job, latents: np.ndarray) -> tuple[np.ndarray, bool]:
    """Frames of one sample, and whether they took tiles."""
    try:
        return pipe.decode(job, latents).frames, False
    except jax.errors.JaxRuntimeError as error:
        check_memory(error)
    return pipe.decode(job, latents, tiled=True).frames, True


def _padded(rows: Sequence[int], count: int) -> list[int]:
    return [*rows, *[rows[0]] * (count - len(rows))]


def _clean(run: Denoising, before: Seen) -> np.ndarray:
    """What the latents [B, T, Y, X, C] seem to become: UniPC's own prediction, or straight on from the segment."""
    if isinstance(run.carry.solver, UniPCState):
        return np.asarray(run.carry.solver.clean)
    after = np.asarray(run.carry.latents)
    return after - run.sigma * (after - before.latents) / (run.sigma - before.sigma)


def _telling(run: Denoising, clean: np.ndarray) -> np.ndarray:
    """The latent frames [B, Y, X, C] that say most of these [B, T, Y, X, C]: the first that is not held, if any."""
    held = 0 if run.held is None else run.held.shape[1]
    return run.with_held(clean)[:, min(held, clean.shape[1] - 1)]
