"""How steps are cut into stages and segments."""

import pytest

from infer.segments import Stage, segment_length, stages_between


def lengths(*breaks):
    return segment_length(stages_between(breaks, [None] * (len(breaks) - 1)))


@pytest.mark.parametrize(
    ("breaks", "expected"),
    [((0, 8), 4), ((0, 6), 3), ((0, 7), 1), ((0, 4, 12), 4), ((0, 3, 9), 3), ((0, 3, 8), 1), ((0, 2, 6, 12), 2)],
)
def test_one_length_of_segment_serves_every_stage(breaks, expected):
    assert lengths(*breaks) == expected


def test_a_stage_of_no_steps_is_left_out():
    assert stages_between([0, 0, 5, 5], "abc") == [Stage(first=0, stop=5, denoiser="b")]
