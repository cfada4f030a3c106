"""TeaCache, MagCache and TaylorSeer in pipelines: the plain result at their identity, shared programs, experts."""

import json

import numpy as np
import pytest
from beside_diffusers import PROMPT, SIZE

from infer import load_pipeline
from infer.request import Request


@pytest.fixture(scope="module")
def pipe(text_to_video):
    return load_pipeline(text_to_video[0])


def test_thresholds_prompts_and_seeds_share_programs(pipe):
    plain = pipe(PROMPT, size=SIZE, frames=5, steps=4)
    same = pipe(PROMPT, size=SIZE, frames=5, steps=4, plan="teacache:0")
    np.testing.assert_array_equal(same.latents, plain.latents)
    programs = len(pipe.programs)
    saved = pipe(PROMPT, size=SIZE, frames=5, steps=4, plan="teacache:1000")
    pipe("a fish", size=SIZE, frames=5, steps=4, plan="teacache:0.3", seed=9)
    assert len(pipe.programs) == programs
    assert np.isfinite(saved.latents).all() and not np.array_equal(saved.latents, plain.latents)


def test_ratios_select_the_steps(pipe, tmp_path):
    (tmp_path / "ratios.json").write_text(json.dumps({"ratios": [1, 0.99, 1.01, 0.98]}))
    result = pipe(PROMPT, size=SIZE, frames=5, plan=f"magcache:0.1:ratios={tmp_path / 'ratios.json'}")
    assert result.metadata[0]["steps"] == 4
    assert np.isfinite(result.latents).all()


def test_a_job_keeps_what_the_file_of_its_plan_said(pipe, tmp_path):
    file = tmp_path / "ratios.json"
    file.write_text(json.dumps({"ratios": [1, 0.99, 1.01, 0.98]}))
    job = pipe.prepare(Request(prompt=PROMPT, size=SIZE, frames=5, plan=f"magcache:0.1:ratios={file}"))
    cost = pipe.cost(job)
    file.unlink()
    assert np.isfinite(pipe.denoise(job)).all() and pipe.cost(job) == cost
    assert pipe.metadata(job)[0]["plan"] == f"magcache:0.1:ratios={file}"


def test_experts_start_with_nothing_kept(text_experts):
    experts = load_pipeline(text_experts[0])
    options = {"size": SIZE, "frames": 5, "steps": 4, "guidance": (3.0, 2.0)}
    plain = experts(PROMPT, **options)
    kept = experts(PROMPT, plan="teacache:1000", **options)
    assert np.isfinite(kept.latents).all() and not np.array_equal(kept.latents, plain.latents)
