"""Plans in pipelines: the plain result at their identity, the solver and steps that they need, experts in turn."""

import gc
import json
import warnings

import jax
import numpy as np
import pytest
from beside_diffusers import PROMPT, SIZE

from dit_jax.config import UserError
from infer import load_pipeline
from infer.request import Request

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


@pytest.mark.parametrize(
    ("plan", "steps", "told"),
    [
        (HALF, 8, ["hsa"]),
        ("hsa:groups=50@12/50@3:window=0.5", 12, []),
        ("teacache:0.1:model=wan2.1-t2v-1.3b", 4, ["teacache"]),
        ("teacache:0.1:model=wan2.1-t2v-1.3b", 9, []),
        ("coredit:0.3+teacache:0.1:model=wan2.1-t2v-1.3b", 8, ["teacache"]),
        ("magcache:0.1:ratios={}", 4, ["magcache"]),
        ("coredit:0.3", 4, []),
        ("taylorseer", 4, []),
        ("dense", 4, []),
    ],
)
def test_methods_that_live_on_many_steps_are_warned_of_at_few(pipe, tmp_path, plan, steps, told):
    ratios = tmp_path / "ratios.json"
    ratios.write_text(json.dumps({"ratios": [1.0, 0.9, 0.9, 0.9]}))
    request = Request(prompt=PROMPT, size=SIZE, frames=5, steps=steps, solver="euler", plan=plan.format(ratios))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipe.prepare(request)
    found = [str(one.message) for one in caught]
    assert [text.split(" is pointless in a run of ")[0] for text in found] == told
    assert all(f"of {steps} steps" in text and "\n" not in text for text in found)


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


def test_what_a_plan_costs_is_of_each_expert_by_its_own_ratios(text_experts, tmp_path):
    experts = load_pipeline(text_experts[0])

    def flops(name, low):
        file = tmp_path / name
        file.write_text(json.dumps({"ratios": [0.5] * 2, "experts": {"transformer_2": [low] * 2}, "stride": 3}))
        request = Request(prompt=PROMPT, size=SIZE, frames=5, steps=4, plan=f"coredit:{file}:late=1")
        return experts.cost(experts.prepare(request)).flops

    assert flops("alike.json", 0.5) < flops("milder.json", 0.1)


@pytest.mark.parametrize("how", ["denoise", "compile"])
def test_two_stages_never_hold_their_states_at_once(text_experts, how):
    experts = load_pipeline(text_experts[0])
    job = experts.prepare(Request(prompt=PROMPT, size=SIZE, frames=5, solver="euler", plan=HALF, seed=1))
    run, states, held, before = experts.programs.run, [], [], []

    def watched(name, function, *arguments, **options):
        if name[0] == "init":
            held.append(sum(states[0] == (array.shape, array.dtype) for array in jax.live_arrays()) if states else 0)
            before.append(jax.tree.map(np.asarray, arguments[-1]))
        result = run(name, function, *arguments, **options)
        if name[0] == "init":
            states.append((result.cache.k.shape, result.cache.k.dtype))
        return result

    experts.programs.run = watched
    gc.collect()
    getattr(experts, how)(job)
    assert len(states) == 2 and states[0] == states[1] and held == [0, 0]
    assert before[0] is None and before[1]._fields == ("change", "order")
    assert how == "compile" or before[1].change.any()
