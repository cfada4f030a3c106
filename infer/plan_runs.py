"""Plans run in turn on one model: how long each takes, beside what its arithmetic promises, and what becomes of the
pictures."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from dit_jax.flops import Cost
from dit_jax.methods.method import Run, RunRecord
from infer.pipeline import Pipeline
from infer.random_pipeline import RandomPipeline
from infer.request import Job
from infer.similarity import psnr, ssim

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class PlanJobs:
    """What a plan is run with: a pipeline, and a job for every sample."""

    pipe: Pipeline
    jobs: Sequence[Job]


class Recorder:
    """Records a run, as a `Watch` of its denoisers and as what is told of variants."""

    def __init__(self, steps: int):
        self.record = RunRecord(steps, [], [])

    def around(self, denoiser: Any, run: Run) -> Any:
        return denoiser

    def finished(self, component: str, state: Any) -> None:
        """Keeps the state's single numbers, on the host: its arrays may fill the device."""
        self.record.states.append(jax.tree.map(lambda leaf: None if leaf.ndim else np.asarray(leaf), state))

    def chosen(self, step: int, variant: int, value: np.ndarray | None) -> None:
        self.record.variants.append(variant)


@dataclass(kw_only=True)
class PlanRuns:
    """Runs of one plan.

    cold                the first denoising, compiling included, in seconds, and `compiling` of them
    seconds             of each warm denoising, the text's encoding included
    end_to_end          of each warm run, decoding included; none where pictures cannot be decoded
    peak_bytes          of the program that holds most (`Programs.peak_bytes`)
    device_peak_bytes   most that the device has held since the process began; None where it does not say
    psnr, ssim          of every sample to the dense one
    """

    cost: Cost
    cold: float = 0.0
    compiling: float = 0.0
    seconds: list[float] = field(default_factory=list)
    end_to_end: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    device_peak_bytes: int | None = None
    psnr: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)


def run_plans(plans: Mapping[str, PlanJobs], rounds: int, say: Say) -> dict[str, PlanRuns]:
    """All runs of every plan; the first plan is what the others' pictures are compared to.

    First each runs cold, on the first sample; then, warm, `rounds` times on that one and once on every other, the plans
    taking turns.
    """
    runs: dict[str, PlanRuns] = {}
    reference: dict[int, np.ndarray] = {}
    for name, plan in plans.items():
        runs[name], latents = _cold(plan.pipe, plan.jobs[0])
        _compare(runs[name], reference, 0, _decoded(plan.pipe, plan.jobs[0], latents)[0])
        say(f"{name}: first run {runs[name].cold:.2f} s, {runs[name].compiling:.2f} s of them compiling")
    turns = [0] * rounds + list(range(1, len(next(iter(plans.values())).jobs)))
    for number, sample in enumerate(turns, start=1):
        for name, plan in plans.items():
            latents, seconds = _timed(plan.pipe, plan.jobs[sample])
            frames, decoding = _decoded(plan.pipe, plan.jobs[sample], latents)
            runs[name].seconds.append(seconds)
            if frames is not None:
                runs[name].end_to_end.append(seconds + decoding)
            if sample:
                _compare(runs[name], reference, sample, frames)
            say(f"run {number} of {len(turns)}: {name} {seconds:.3f} s")
    return runs


def rows(runs: Mapping[str, PlanRuns], plans: Mapping[str, PlanJobs]) -> list[dict[str, Any]]:
    """A row a plan, as `--json` has them (docs/benchmarks.md); speed-ups are over the first plan."""
    dense = next(iter(runs.values()))
    return [_row(name, plans[name].jobs[0], of_plan, dense) for name, of_plan in runs.items()]


def _row(name: str, job: Job, runs: PlanRuns, dense: PlanRuns) -> dict[str, Any]:
    seconds = statistics.median(runs.seconds)
    predicted = dense.cost.flops / runs.cost.flops
    measured = statistics.median(dense.seconds) / seconds
    return {
        "plan": name,
        "steps": job.steps,
        "seconds": seconds,
        "end_to_end_seconds": _median(runs.end_to_end),
        "cold_seconds": runs.cold,
        "compile_seconds": runs.compiling,
        "predicted_speedup": predicted,
        "measured_speedup": measured,
        "efficiency": measured / predicted,
        "peak_bytes": runs.peak_bytes,
        "device_peak_bytes": runs.device_peak_bytes,
        "flops": runs.cost.flops,
        "flops_per_second": runs.cost.flops / seconds,
        "weight_bytes_read": runs.cost.weights,
        "activation_bytes_moved": runs.cost.activations,
        "psnr": _mean(runs.psnr),
        "ssim": _mean(runs.ssim),
    }


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _cold(pipe: Pipeline, job: Job) -> tuple[PlanRuns, np.ndarray]:
    compiled = pipe.programs.seconds
    pipe.programs.used.clear()
    recorder = Recorder(job.steps)
    latents, seconds = _timed(pipe, job, recorder)
    runs = PlanRuns(
        cost=pipe.cost(job, recorder.record),
        cold=seconds,
        compiling=pipe.programs.seconds - compiled,
        peak_bytes=pipe.programs.peak_bytes(),
        device_peak_bytes=(jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    )
    return runs, latents


def _timed(pipe: Pipeline, job: Job, recorder: Recorder | None = None) -> tuple[np.ndarray, float]:
    began = time.perf_counter()
    latents = pipe.denoise(job, watch=recorder, chosen=recorder.chosen if recorder else None)
    return latents, time.perf_counter() - began


def _decoded(pipe: Pipeline, job: Job, latents: np.ndarray) -> tuple[np.ndarray | None, float]:
    """Frames, and the seconds that they took."""
    if isinstance(pipe, RandomPipeline):
        return None, 0.0
    began = time.perf_counter()
    frames = pipe.decode(job, latents).frames
    return frames, time.perf_counter() - began


def _compare(runs: PlanRuns, reference: dict[int, np.ndarray], sample: int, frames: np.ndarray | None) -> None:
    if frames is None:
        return
    expected = reference.setdefault(sample, frames)
    runs.psnr.append(psnr(frames, expected))
    runs.ssim.append(ssim(frames, expected))
