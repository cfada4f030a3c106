"""A job on its way through its steps, segment by segment, so that a driver may show, stop or share what runs.

Shapes: B samples, T Y X latent grid, C latent channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import numpy as np

from dit_jax.config import UserError
from dit_jax.methods.method import Run
from dit_jax.sampling.sampler import Carry, Guided, handed_over, noise, sample
from dit_jax.sampling.schedules import Schedule
from dit_jax.sampling.solvers import SOLVERS
from dit_jax.sharding import batch_shardings, fetched
from infer.request import Job, joined
from infer.segments import Stage, cut, segment_length
from infer.variants import Chosen, Variants, rows_of

if TYPE_CHECKING:
    from infer.pipeline import Pipeline


class Watch(Protocol):
    """What looks into a run: it puts a denoiser around each that runs, and is shown that denoiser's last state.

    component  the transformer that the stage ran
    """

    def around(self, denoiser: Any, run: Run) -> Any: ...
    def finished(self, component: str, state: Any) -> None: ...


class Entered(NamedTuple):
    """A stage that has begun, its denoisers, and the first frames that they hold, if any."""

    stage: Stage
    variants: Variants
    held: jax.Array | None


class Denoising:
    """`advance()` runs the next segment until `finished`; `done` of the job's steps have been taken.

    watch   looks into every stage's denoiser
    chosen  is told which variant each step ran with, where the plan chooses among some (patch sizes)
    stages  of the job, where a run that it goes on from has made them
    Where latents choose, samples may disagree (`agreeing`): `of` some is a run of theirs that goes on from here.
    """

    def __init__(
        self,
        pipe: Pipeline,
        job: Job,
        *,
        watch: Watch | None = None,
        chosen: Chosen | None = None,
        stages: list[Stage] | None = None,
    ):
        self.pipe, self.job, self.done = pipe, job, 0
        self._plan, self._solver, self._watch, self._chosen = job.plan, SOLVERS[job.solver], watch, chosen
        breaks = self._plan.chooser.breaks(job.steps) if self._plan.chooser else ()
        with pipe.on_mesh():
            schedule = pipe.schedule(job)
            self._stages = pipe.stages(job, schedule) if stages is None else stages
            spans = cut(self._stages, breaks)
            self.segment_steps = segment_length(spans)
            self._starts = {span.first for span in spans}
            self._sigmas = [float(sigma) for sigma in np.asarray(schedule.sigmas)]
            self._schedule: Schedule = jax.tree.map(pipe.replicated, schedule)
            latents = pipe.rows(_starting_noise(pipe, job))
            self.carry = Carry(latents, _run_if_any(pipe, ("solver", self._solver), self._solver.init, latents), None)
        self._here: Entered | None = None
        self._pinned: Any = None

    @property
    def finished(self) -> bool:
        """Whether the last step has been taken."""
        return self.done == self.job.steps

    @property
    def sigma(self) -> float:
        """The noise level that has been reached."""
        return self._sigmas[self.done]

    def advance(self) -> None:
        """Runs the next segment; what it gives may still be on its way when this returns."""
        with self.pipe.on_mesh():
            stage, variants, _ = self._entered()
            if self.done in self._starts:
                self._choose(stage, variants)
            self.carry = self._segment(self.pipe.programs.run, variants.denoiser, self.carry, self._pinned)
            self.done += self.segment_steps
            if self.done == stage.stop:
                if self._watch is not None:
                    self._watch.finished(stage.component, self.carry.denoiser)
                self.carry = self.carry._replace(denoiser=self._left_by(variants.denoiser, self.carry.denoiser))

    def agreeing(self) -> list[list[int]]:
        """Rows of the samples that want the same of the next segment, group by group."""
        chooser, count = self._plan.chooser, len(self.job.prompts)
        if self.finished or chooser is None or not chooser.by_latents:
            return [list(range(count))]
        with self.pipe.on_mesh():
            wanted = self._entered().variants.wanted(self.done, self.carry.latents)
        return [[row for row in range(count) if wanted[row] == variant] for variant in dict.fromkeys(wanted)]

    def of(self, rows: Sequence[int]) -> Denoising:
        """A run of some of its samples, some of them several times, that goes on from here."""
        run = self._begun(rows, watch=self._watch, chosen=self._chosen)
        with self.pipe.on_mesh():
            mine, its = self._entered().variants, run._entered().variants
            its.of(rows, mine)
            latents, solver = jax.tree.map(lambda leaf: self.pipe.rows(rows_of(leaf, rows)), self.carry[:2])
            run.carry = Carry(latents, solver, None)
            if mine.current is not None:
                run.carry, run._pinned = _started(self.pipe, its.denoiser, run.carry, None)
                run.carry = run.carry._replace(denoiser=self._state_of(rows, run.carry.denoiser))
        return run

    def _begun(self, rows: Sequence[int], **told: Any) -> Denoising:
        """A run of these samples at this step, that is told what this one is, and has neither latents nor state yet."""
        job = joined([self.job.single(row) for row in rows])
        count = len(self.job.prompts)
        stages = [replace(one, denoiser=partial(_of_rows, self.pipe, one, rows, count)) for one in self._stages]
        run = Denoising(self.pipe, job, stages=stages, **told)
        run.done = self.done
        return run

    def _state_of(self, rows: Sequence[int], like: Any) -> Any:
        """The denoiser's state of these samples, placed as `like` is, a state of as many."""
        lone = self._begun([0])
        denoiser = lone._entered().variants.of_variant(self._entered().variants.current)
        of_lone = _abstract(_init, denoiser, lone.carry.latents, None)

        def of_rows(leaf: jax.Array, of_one: jax.ShapeDtypeStruct, placed: jax.Array) -> jax.Array:
            both = zip(leaf.shape, of_one.shape, strict=True)
            differ = [axis for axis, (many, one) in enumerate(both) if many != one]
            mine = rows_of(leaf, rows, differ[0], of_one.shape[differ[0]]) if differ else leaf
            return jax.device_put(mine, placed.sharding)

        return jax.tree.map(of_rows, self.carry.denoiser, of_lone, like)

    def compile(self) -> None:
        """Compiles what the job's steps need, and runs none of them."""
        with self.pipe.on_mesh():
            before = None
            for stage in self._stages:
                variants = self._enter(stage).variants
                variants.compile_choice(self.carry.latents)
                for denoiser in variants.all:
                    left = self._compile(denoiser, before)
                before = left

    def final(self) -> np.ndarray:
        """Final latents [B, T, Y, X, C], fp32 in the sampler's normalised units."""
        with self.pipe.on_mesh():
            return self.with_held(fetched(self.carry.latents))

    @property
    def held(self) -> jax.Array | None:
        """First latent frames [B, T', Y, X, C] that are known from the start, or None; the carry has noise there."""
        return (self._here or self._entered()).held

    def with_held(self, latents: np.ndarray) -> np.ndarray:
        """A copy of latents [B, T, Y, X, C] of the run with the held frames in their place."""
        latents = np.array(latents)
        if self.held is not None:
            latents[:, : self.held.shape[1]] = fetched(self.held)
        return latents

    def _entered(self) -> Entered:
        """The stage of the next step, or, once all have been taken, of the last one."""
        step = min(self.done, self.job.steps - 1)
        stage = next(one for one in self._stages if one.first <= step < one.stop)
        if self._here is None or self._here.stage is not stage:
            self._here = self._enter(stage)
        return self._here

    def _enter(self, stage: Stage) -> Entered:
        if stage.first:
            jax.block_until_ready(self.carry)  # or the weights that it needs cannot leave the devices
        pipe, plan, watch = self.pipe, self._plan, self._watch
        run = Run(
            latents_shape=self.carry.latents.shape,
            first=stage.first,
            stop=stage.stop,
            steps=self.job.steps,
            sigmas=self._schedule.sigmas,
            parts=pipe.parts[stage.component],
            component=stage.component,
        )
        plain = stage.denoiser()

        def applied(run: Run) -> Any:
            return plan.applied(plain, run) if watch is None else watch.around(plan.applied(plain, run), run)

        variants = Variants(plan.chooser, applied, run, pipe.programs, self._chosen)
        for denoiser in variants.unforetold:
            self._compile(denoiser)
        return Entered(stage, variants, plain.held)

    def _choose(self, stage: Stage, variants: Variants) -> None:
        if not variants.choose(self.done, self.carry.latents):
            return
        if self.done > stage.first:
            if self._watch is not None:
                self._watch.finished(stage.component, self.carry.denoiser)
            self.carry = self.carry._replace(denoiser=None)
        self.carry, self._pinned = _started(self.pipe, variants.denoiser, self.carry, self.carry.denoiser)

    def _left_by(self, denoiser: Any, state: Any) -> Any:
        """What a stage leaves to the next; of variants nothing, as what each keeps is of its own shape."""
        return None if self._plan.chooser else handed_over(denoiser, state)

    def _compile(self, denoiser: Any, before: Any = None) -> Any:
        """Compiles a denoiser's segment, and the start of its state behind another's; returns what it leaves itself."""
        carry, pinned = _started(self.pipe, denoiser, self.carry, before)
        self._segment(self.pipe.programs.compiled, denoiser, carry, pinned)
        return self._left_by(denoiser, carry.denoiser)

    def _segment(self, use: Callable, denoiser: Any, carry: Carry, pinned: Any) -> Any:
        solver, count = self._solver, self.segment_steps
        return use(
            ("segment", solver, count), partial(_segment, solver, count),
            denoiser, carry, self._schedule, self.pipe.replicated(np.int32(self.done)),
            donate=(1,), out_shardings=pinned,
        )  # fmt: skip


def _segment(solver: Any, count: int, denoiser: Guided, carry: Carry, schedule: Schedule, first: jax.Array) -> Carry:
    return sample(denoiser, solver, carry, schedule, first, count)


def _init(denoiser: Any, latents: jax.Array, before: Any) -> Any:
    return denoiser.init(latents, before)


def _of_rows(pipe: Pipeline, stage: Stage, rows: Sequence[int], count: int) -> Guided:
    """The plain denoiser of a stage for these of its `count` samples."""
    guided = stage.denoiser()

    def taken(leaf: jax.Array) -> jax.Array:
        return pipe.rows(rows_of(leaf, rows, of_each=len(leaf) // count))

    conditioning, extra, held = jax.tree.map(taken, (guided.conditioning, guided.extra, guided.held))
    return replace(guided, conditioning=conditioning, extra=extra, held=held)


def _run_if_any(pipe: Pipeline, name: Any, function: Callable, *arguments: Any) -> Any:
    """What a function of the devices' arrays gives; where that holds no arrays, no program is made of it."""
    result = _abstract(function, *arguments)
    return pipe.programs.run(name, function, *arguments) if jax.tree.leaves(result) else result


def _abstract(function: Callable, *arguments: Any) -> Any:
    """Shapes of what a function gives. jax keeps every trace of a function for as long as that lives, so this one's is
    of a function that goes."""
    return jax.eval_shape(partial(function), *arguments)


def _started(pipe: Pipeline, denoiser: Any, carry: Carry, before: Any) -> tuple[Carry, Any]:
    """The carry of a denoiser's first step, and how its arrays are split over the mesh: outputs are pinned to that,
    or the next segment compiles again. `before` is what the denoiser before it has left, or None."""
    if pipe.mesh is not None:
        latents, solver = (jax.device_put(part, batch_shardings(part, pipe.mesh)) for part in carry[:2])
        carry = Carry(latents, solver, None)
    carry = carry._replace(denoiser=_run_if_any(pipe, ("init", type(denoiser)), _init, denoiser, carry.latents, before))
    return carry, None if pipe.mesh is None else jax.tree.map(lambda leaf: leaf.sharding, carry)


def _starting_noise(pipe: Pipeline, job: Job) -> jax.Array | np.ndarray:
    shape = pipe.latents_shape(job.size, job.frames)
    count = len(job.prompts)
    if job.latents is None:
        seeds = pipe.rows(np.array(job.seeds, np.uint32))
        return pipe.programs.run(("noise", shape), partial(noise, shape=shape), seeds)
    if job.latents.shape != (count, *shape):
        raise UserError(f"latents have shape {job.latents.shape}: expected {(count, *shape)}, channels last")
    return np.array(job.latents, np.float32)
