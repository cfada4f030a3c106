"""A look at what is trained while it is trained: prompts sampled and drawn, and the scores of `dit-eval`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert.checkpoint import leaf_reader
from convert.wan import HIGH_NOISE
from dit_jax.config import UserError
from dit_jax.methods.plan import DENSE
from dit_jax.parameters import named_leaves, with_leaves
from dit_jax.sharding import fetched
from infer import evaluate
from infer.loras import replace_leaves
from infer.media import save
from infer.pipeline import Pipeline
from infer.plan_scores import NOT_SCORES
from infer.prompts_file import read_prompts
from train.placement import in_dtype
from train.preview import draw
from train.step import TrainState, TrainStep, of_modules

FOLDER = "samples"
COUNTS = ("videos", "pictures")  # beside the scores of a report


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """What is sampled: each line of the file `prompts`, and `scored` prompts of the model's suite, with a plan."""

    prompts: str = ""
    scored: int = 0
    plan: str = ""


@dataclass(kw_only=True)
class Samples:
    """`samples(state, taken)` samples the running mean of the weights into `out`/samples and returns scores.

    All processes of a run sample together, and the first one writes.
    pipe       the pipeline of the checkpoint that is trained; its transformer, parts and how it is sampled are replaced
               each time
    result     trained modules by name -> the checkpoint with them (`Training.result`)
    component  the transformer that is trained: the other expert, where there is one, stays
    """

    out: Path
    settings: SampleSettings
    step: TrainStep
    pipe: Pipeline
    result: Any
    component: str = HIGH_NOISE

    def __post_init__(self) -> None:
        if self.settings.scored == 1:
            raise UserError("scored is 1: expected 0, or at least 2 samples, to compare distributions")
        if self.pipe.limits.image == "always":
            raise UserError(
                f"{self.pipe.name} starts from an image, which training has none of: expected sample_every=0; draw "
                "samples from the exported model"
            )

    @cached_property
    def _prompts(self) -> list[str]:
        return read_prompts(self.settings.prompts) if self.settings.prompts else []

    def __call__(self, state: TrainState, taken: int) -> dict[str, float]:
        self._take(of_modules(state.ema))
        if self._prompts:
            self._draw(taken)
        if not self.settings.scored:
            return {}
        words = ["--model", self.pipe.name, "--samples", str(self.settings.scored)]
        words += ["--plan", self.settings.plan] if self.settings.plan else []
        report = evaluate.evaluate(evaluate.parser().parse_args(words), self.pipe)
        return {name: float(report[name]) for name in report if name not in (*NOT_SCORES, *COUNTS)}

    def _take(self, trained: Mapping[str, Mapping[str, jax.Array]]) -> None:
        """The pipeline with what is trained in place of what it was."""
        # A student's weights go from device to device; all else is small, and is read here.
        modules: dict[str, Mapping[str, Any]] = {
            name: leaves if name == "student" else {path: fetched(leaf) for path, leaf in leaves.items()}
            for name, leaves in trained.items()
        }
        checkpoint, dtype = self.result(self.pipe.checkpoint, modules), self.step.plan.dtype
        self.pipe.take_settings(checkpoint)
        held = holder, name = self.pipe.lora_models()[self.component]
        if "student" in modules:
            abstract: Any = checkpoint.component(self.component).abstract
            holder[name] = in_dtype(with_leaves(abstract, modules["student"]), dtype)
        elif self.component in checkpoint.edited:  # a LoRA is in its weights
            shardings = {leaf: array.sharding for leaf, array in named_leaves(holder[name])}
            read = leaf_reader(checkpoint, self.component, shardings=shardings, dtype=dtype)
            replace_leaves(held, shardings, lambda leaf, _: read(leaf))

    def _draw(self, taken: int) -> None:
        plan = self.settings.plan or DENSE
        frames = [self.pipe(prompt, seed=0, plan=plan).frames[0] for prompt in self._prompts]
        if jax.process_index() != 0:
            return
        video = np.stack([each if each.ndim == 4 else each[None] for each in frames])
        folder = self.out / FOLDER
        draw(video, folder / f"{taken:06d}.png")
        (folder / "prompts.txt").write_text("\n".join(self._prompts) + "\n", encoding="utf-8")
        if video.shape[1] > 1:
            for number, clip in enumerate(video):
                save(folder / f"{taken:06d}-{number}.mp4", clip, self.pipe.defaults.fps, {"step": taken})
