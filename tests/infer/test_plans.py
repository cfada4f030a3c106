"""Plans in pipelines: the plain result at their identity, the solver and steps that they need, experts in turn."""

import numpy as np
import pytest
from beside_diffusers import PROMPT, SIZE

from dit_jax.config import UserError
from infer import load_pipeline

ALL_STEPS = "hsa:groups=100@4"
HALF = "hsa:groups=50@8/50@2:window=0.5"


@pytest.fixture(scope="module")
def pipe(text_to_video):
    return load_pipeline(text_to_video[0])


def test_a_plan_that_saves_nothing_is_the_plain_model(pipe):
    plain = pipe(PROMPT, size=SIZE, frames=5, steps=4, solver="euler")
    np.testing.assert_array_equal(
        pipe(PROMPT, size=SIZE, frames=5, solver="euler", plan=ALL_STEPS).latents, plain.latents
    )


def test_a_plan_selects_its_solver_and_steps_and_says_so(pipe):
    with pytest.warns(UserWarning, match="works with the euler solver: it takes the place of unipc"):
        result = pipe(PROMPT, size=SIZE, frames=5, plan=HALF)
    told = result.metadata[0]
    assert (told["plan"], told["solver"], told["steps"]) == (HALF, "euler", 8)
    assert np.isfinite(result.latents).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"plan": HALF, "solver": "unipc"}, "euler solver alone, found unipc"),
        ({"plan": HALF, "steps": 9}, "is for 8 steps, found 9"),
        ({"plan": "hsa:60"}, "expected a preset of 75A"),
        ({"plan": "fast"}, "expected methods of dense"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_before_anything_compiles(pipe, options, words):
    programs = len(pipe.programs)
    with pytest.raises(UserError, match=words):
        pipe(PROMPT, size=SIZE, frames=5, **options)
    assert len(pipe.programs) == programs


def test_prompts_and_seeds_of_a_plan_share_its_programs(pipe):
    pipe(PROMPT, size=SIZE, frames=5, solver="euler", plan=HALF)
    programs = len(pipe.programs)
    pipe("a fish", size=SIZE, frames=5, solver="euler", plan=HALF, seed=9)
    assert len(pipe.programs) == programs
    for seed in (3, 4):
        pipe(PROMPT, size=SIZE, frames=5, solver="euler", plan=f"{HALF}:ranking=random:seed={seed}")
    assert len(pipe.programs) == programs + 2  # without a ranking to be made: a first state and a segment


def test_experts_hand_over_with_a_full_step(text_experts):
    experts = load_pipeline(text_experts[0])
    plain = experts(PROMPT, size=SIZE, frames=5, steps=4, solver="euler", guidance=(3.0, 2.0))
    same = experts(PROMPT, size=SIZE, frames=5, solver="euler", guidance=(3.0, 2.0), plan=ALL_STEPS)
    np.testing.assert_array_equal(same.latents, plain.latents)
    result = experts(PROMPT, size=SIZE, frames=5, solver="euler", guidance=(3.0, 2.0), plan=HALF)
    assert np.isfinite(result.latents).all()
