"""The parts of `train.miniature`: what is made of a demo model, by which command, and what has to be there before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert.checkpoint import open_checkpoint
from dit_jax.methods.plan import DENSE
from dit_jax.methods.routing import LEAST, MOST, Routing
from train.demo_media import CAPTIONS, PROMPTS
from train.pare_loss import TEXT_TO_VIDEO
from train.stages import Stage

SHARE = 0.69  # of the blocks, on average over a run's steps, as in the paper
RATIO = 0.45
TOKENS = 0.4  # of the base size's, that DDiT's threshold is calibrated to: four of five steps at twice the patch size
SIZES = "2p"  # that it chooses beyond p: all steps of these models bend so alike that nearly all would be at 4p
FEW = 4
EULER = ("--solver", "euler", "--steps")
AS_TRAINED = ()  # a few-step student's checkpoint says how it is sampled
RANK = 16  # of the few-step students as LoRAs
# The demo variants', but for what takes longer to learn than the rest: to do without heads and blocks, larger patches.
STEPS = {"finetune": 300, "pare_stage1": 2400, "pare_stage2": 2400, "step_distill": 200, "coredit": 1200, "ddit": 1800}
STUDENTS = ("stage1", "stage2", "coredit", "ddit", "four-steps", "stage3")
BRIEF = {"pare_stage1": 300, "pare_stage2": 600}  # where they are compared with a rival that is trained as briefly


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is asked for.

    blocks  that a routed student runs, without noise and at pure noise
    shift   of the sampler's noise, by which CoReDiT knows a run's last steps
    length  of the trainings, in `STEPS`
    """

    model: str
    out: Path
    samples: int
    steps: int
    examples: int
    length: float
    seed: int
    blocks: tuple[int, int]
    shift: float

    @property
    def videos(self) -> bool:
        """Whether the model makes videos."""
        return self.model == "demo-wan"

    @property
    def bucket(self) -> str:
        """The shape of its examples."""
        return "128x128x17" if self.videos else "128x128"

    @property
    def routing(self) -> str:
        """The plan of a routed student."""
        return "routing:min={}:max={}".format(*self.blocks)

    @property
    def limits(self) -> dict[str, int]:
        """`blocks` as the recipes call them."""
        return {"least": self.blocks[0], "most": self.blocks[1]}

    @property
    def routed(self) -> dict[str, Any]:
        """Settings of stage II: demo-flux learns it faster at three times the demo's rate (docs/losses.md), demo-wan's
        router is kept at its ranking, which it leaves for a worse one (docs/distillation.md)."""
        return self.limits | ({"router_rate": 1e-6} if self.videos else {"learning_rate": 1.5e-3})

    @property
    def prompts(self) -> Path:
        """To calibrate on."""
        return self.path("media") / PROMPTS

    def path(self, name: str) -> Path:
        """Of something that is made."""
        return self.out / name

    def report(self, name: str) -> Path:
        """Of the scores of something."""
        return self.out / "scores" / f"{name}.json"


def sampled(model: str, steps: int) -> dict[str, Any]:
    """What a `Study` takes from how the model is sampled: `shift`, and as `blocks` those (without noise, at pure noise)
    that lie about as far apart as the paper's and whose mean over a run's steps is nearest to `SHARE`."""
    from infer import load_pipeline
    from infer.request import Request

    pipe = load_pipeline(model)
    timesteps = pipe.schedule(pipe.prepare(Request(prompt="a red 7", steps=steps, solver="euler"))).timesteps
    blocks = sum(open_checkpoint(model).component("transformer").abstract.stacks)  # type: ignore[attr-defined]
    usual = round((MOST - LEAST) * blocks)
    pairs = [
        (least, least + apart) for apart in (usual, usual - 1, usual + 1) for least in range(2, blocks - apart + 1)
    ]
    shares = [Routing(least=least, most=most).mean_share(timesteps, blocks) for least, most in pairs]
    return {"blocks": pairs[int(np.argmin(np.abs(np.array(shares) - SHARE)))], "shift": pipe.shift.constant}


def stages(study: Study) -> list[Stage]:
    """All parts but the timing, each behind what it needs."""
    tuned = _student(study, "finetune", "finetune", {})
    return [*_data(study), *tuned, *_pare(study), *_few_steps(study), *_coredit(study), *_ddit(study)]


def _data(study: Study) -> Iterator[Stage]:
    media, kind = study.path("media"), "videos" if study.videos else "images"
    captions = media / CAPTIONS
    made = ("--clips" if study.videos else "--pictures", str(study.examples), "--out", str(media))
    yield Stage(name="media", makes=captions, command=("python", "-m", "train.demo_media", *made))
    encode = ("dit-encode", "--model", study.model, f"--{kind}", str(media), "--captions", str(captions))
    yield Stage(
        name="data", makes=study.path("data") / "manifest.json", after=("media",),
        command=(*encode, "--buckets", study.bucket, "--out", str(study.path("data"))),
    )  # fmt: skip
    yield _scored(study, "teacher", study.model, against=None)
    unguided = ("--guidance", "1") if study.videos else ("--true-cfg", "1")
    yield _scored(study, "teacher-few", study.model, sampling=(*EULER, str(FEW)))
    yield _scored(study, "teacher-few-unguided", study.model, sampling=(*EULER, str(FEW), *unguided))


def _pare(study: Study) -> Iterator[Stage]:
    narrow = {"stage1-brief": _pruned(study, "pruned")}
    narrow["stage1-random"] = _pruned(study, "pruned-random", "--choose", "random")
    if study.videos:
        narrow["stage1-unprotected"] = _pruned(study, "pruned-unprotected", "--protection", "1")
    brief_one, brief_two = (_steps(study, usual) for usual in BRIEF.values())
    as_the_paper = {"steps": brief_one, "features": TEXT_TO_VIDEO.features}
    for name, pruned in narrow.items():
        yield pruned
        yield from _student(study, name, "pare_stage1", as_the_paper, student=pruned.name)
    yield from _student(study, "stage1", "pare_stage1", {}, student="pruned")
    yield from _student(study, "stage2", "pare_stage2", study.routed, student="stage1", plan=study.routing)
    yield _scored(study, "stage2-lot", str(study.path("stage2")), plan=f"{study.routing}:choose=random", of="stage2")
    rivals: dict[str, tuple[str, dict[str, Any]]] = {
        "stage2-brief": ("stage1-brief", {"steps": brief_two}),
        "stage2-time": ("stage1-brief", {"steps": brief_two, "content": False}),
        "stage2-raw": ("pruned", {"steps": brief_one + brief_two}),
    }
    for name, (student, settings) in rivals.items():
        told = study.routed | settings
        yield from _student(study, name, "pare_stage2", told, student=student, plan=study.routing)


def _few_steps(study: Study) -> Iterator[Stage]:
    yield from _student(study, "four-steps", "step_distill", {}, sampling=AS_TRAINED)
    yield from _as_lora(study, "four-steps", study.model)
    told = {"student": "stage2", "plan": study.routing}
    yield from _student(study, "stage3", "step_distill", study.limits, **told, sampling=AS_TRAINED)
    yield from _as_lora(study, "stage3", str(study.path("stage2")), plan=study.routing)


def _as_lora(study: Study, name: str, base: str, plan: str = DENSE) -> Iterator[Stage]:
    lora = f"{name}-lora"
    words = (str(study.path(name)), str(study.path(lora)), "--base", base, "--lora-rank", str(RANK))
    yield Stage(name=lora, makes=study.path(lora), command=("dit-convert", "to-torch", *words), after=(name,))
    yield _scored(study, lora, str(study.path(lora)), plan, sampling=AS_TRAINED, of=lora)


def _coredit(study: Study) -> Iterator[Stage]:
    told = {"ratio": RATIO, "shift": study.shift}
    yield from _student(study, "coredit", "coredit", told, plan="coredit")
    yield from _student(study, "coredit-uniform", "coredit", told | {"adaptive": False}, plan="coredit")


def _ddit(study: Study) -> Iterator[Stage]:
    for name, settings in (("ddit", {}), ("ddit-bare", {"rank": 0})):
        yield _trained(study, name, "ddit", {"sizes": SIZES, **settings})
        yield from _calibrated(study, name, name)
    for order in ("2", "1"):
        yield from _calibrated(study, f"ddit-order{order}", "ddit", "--order", order)


def _calibrated(study: Study, name: str, model: str, *words: str) -> Iterator[Stage]:
    file, folder = study.path(f"{name}.json"), str(study.path(model))
    command = ("dit-calibrate", "ddit", "--model", folder, "--prompts", str(study.prompts))
    asked = ("--tokens", str(TOKENS), "--sizes", SIZES, "--steps", str(study.steps), "--solver", "euler", *words)
    yield Stage(name=f"{name}-tau", makes=file, command=(*command, *asked, "--out", str(file)), after=(model,))
    yield _scored(study, name, folder, plan=f"ddit:{file}", of=f"{name}-tau")


def _pruned(study: Study, name: str, *words: str) -> Stage:
    widths = ("--heads", "0.3", "--ffn", "0.3", *words)
    widths += () if "random" in words else ("--prompts", str(study.prompts))
    return Stage(
        name=name, makes=study.path(name), after=("media",),
        command=("dit-prune", "--model", study.model, *widths, "--out", str(study.path(name))),
    )  # fmt: skip


def _student(
    study: Study,
    name: str,
    recipe: str,
    settings: Mapping[str, Any],
    student: str = "",
    plan: str = DENSE,
    sampling: tuple[str, ...] | None = None,
) -> Iterator[Stage]:
    """A training and its scores."""
    yield _trained(study, name, recipe, settings, student)
    yield _scored(study, name, str(study.path(name)), plan, sampling, of=name)


def _trained(study: Study, name: str, recipe: str, settings: Mapping[str, Any], student: str = "") -> Stage:
    told: dict[str, Any] = {"variant": "demo", "model": study.model, "data": study.path("data"), "seed": study.seed}
    told |= {"student": study.path(student)} if student else {}
    told |= {"steps": _steps(study, STEPS[recipe]), "out": study.path("runs") / name, "export": study.path(name)}
    told |= settings
    words = [word for key, value in told.items() for word in ("--set", f"{key}={value}")]
    return Stage(
        name=name, makes=study.path(name), command=("dit-train", recipe, *words),
        after=("data", student) if student else ("data",),
    )  # fmt: skip


def _steps(study: Study, usual: int) -> int:
    return max(1, round(usual * study.length))


def _scored(
    study: Study,
    name: str,
    model: str,
    plan: str = DENSE,
    sampling: tuple[str, ...] | None = None,
    of: str | None = None,
    against: str | None = "teacher",
) -> Stage:
    """Scores beside the teacher's, of Euler's method unless `sampling` says otherwise."""
    words = ["--model", model, "--samples", str(study.samples), "--plan", plan, "--report", str(study.report(name))]
    words += (*EULER, str(study.steps)) if sampling is None else sampling
    words += ["--keep", str(study.path("samples"))]
    words += ["--against", str(study.report(against))] if against else []
    after = tuple(filter(None, (of, against and f"{against}-scores")))
    return Stage(name=f"{name}-scores", makes=study.report(name), command=("dit-eval", *words, "--json"), after=after)


def bench_stage(study: Study) -> Stage:
    """The timing of the teacher and its students."""
    plans = ",".join(entries(study).values())
    words = ("--model", study.model, "--steps", str(study.steps), "--solver", "euler", "--rounds", "5")
    file, needs = study.path("bench.json"), (*STUDENTS, "ddit-tau")
    command = ("dit-bench", *words, "--plans", plans, "--json", str(file))
    return Stage(name="bench", makes=file, command=command, after=needs)


def entries(study: Study) -> dict[str, str]:
    """How `dit-bench` names the teacher and its students."""
    on = {name: f"on:{study.path(name)}" for name in STUDENTS}
    return {
        "teacher": DENSE,
        "stage1": on["stage1"],
        "stage2": f"{on['stage2']}+{study.routing}",
        "coredit": f"{on['coredit']}+coredit",
        "ddit": f"{on['ddit']}+ddit:{study.path('ddit.json')}",
        "four-steps": f"{on['four-steps']}+dense:{FEW}",
        "stage3": f"{on['stage3']}+dense:{FEW}+{study.routing}",
    }
