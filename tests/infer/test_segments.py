"""How steps are cut into stages and segments."""

from types import SimpleNamespace

import numpy as np
import pytest

from infer.segments import Stage, segment_length, stages_between
from infer.wan_pipeline import WanPipeline


def lengths(*breaks):
    return segment_length(stages_between(breaks, [None] * (len(breaks) - 1)))


@pytest.mark.parametrize(
    ("breaks", "expected"),
    [((0, 8), 4), ((0, 6), 3), ((0, 7), 1), ((0, 4, 12), 4), ((0, 3, 9), 3), ((0, 3, 8), 1), ((0, 2, 6, 12), 2)],
)
def test_one_length_of_segment_serves_every_stage(breaks, expected):
    assert lengths(*breaks) == expected


def test_the_expert_for_high_noise_runs_down_to_the_boundary_itself():
    """As in diffusers, where t >= boundary is high noise."""
    pipe = SimpleNamespace(variant=SimpleNamespace(boundary=875.0), _told=lambda job: None, experts={})
    job = SimpleNamespace(guidance_scales=(4.0, 3.0), steps=5)
    for timesteps, crossing in (((1000, 900, 875, 874, 10), 3), ((1000, 900, 874.9, 500, 10), 2)):
        stages = WanPipeline.stages(pipe, job, SimpleNamespace(timesteps=np.float32(timesteps)))
        told = [(stage.first, stage.stop, stage.component) for stage in stages]
        assert told == [(0, crossing, "transformer"), (crossing, 5, "transformer_2")]


def test_a_stage_of_no_steps_is_left_out():
    assert stages_between([0, 0, 5, 5], "abc") == [Stage(first=0, stop=5, denoiser="b")]
