"""What becomes of a request: its open choices, its samples in order, and jobs put together and taken apart."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from infer.request import Defaults, Request, fill, joined

DEFAULTS = Defaults(size=(96, 64), frames=9, steps=7, guidance=4.0, true_cfg=1.5, solver="euler")
PLAN = "hsa:groups=50@12/50@3:window=0.5"


def pictures(count):
    return [Image.new("RGB", (2, 2), (index, 0, 0)) for index in range(count)]


def test_samples_of_a_prompt_lie_next_to_each_other_with_its_images_and_seeds_of_their_own():
    first, last = pictures(2), pictures(2)[::-1]
    job = fill(
        Request(prompt=["a", "b"], image=first, last_image=last, images_per_prompt=2, seed=5), DEFAULTS, "guidance"
    )
    assert job.prompts == ["a", "a", "b", "b"] and job.seeds == [5, 6, 7, 8] and job.negative_prompts == [""] * 4
    assert (
        [image is first[0] for image in job.images] == [image is last[0] for image in job.last_images] == [1, 1, 0, 0]
    )
    alone = fill(Request(prompt="a", image=first[1], images_per_prompt=3), DEFAULTS, "guidance")
    assert all(image is first[1] for image in alone.images) and len(alone.images) == 3


def test_what_is_asked_for_goes_before_the_plan_and_that_before_the_defaults():
    plain = fill(Request(prompt="a"), DEFAULTS, "guidance")
    assert (plain.size, plain.frames, plain.steps, plain.guidance, plain.solver) == ((96, 64), 9, 7, 4.0, "euler")
    assert plain.shift is None and plain.guidance_scales == (4.0, 4.0)
    assert fill(Request(prompt="a", plan=PLAN), DEFAULTS, "guidance").steps == 12
    asked = Request(prompt="a", plan=PLAN, steps=3, size=(32, 32), frames=1, guidance=(0.0, 2.0), shift=2.5)
    job = fill(asked, DEFAULTS, "guidance")
    assert (job.size, job.frames, job.steps, job.guidance_scales, job.shift) == ((32, 32), 1, 3, (0.0, 2.0), 2.5)


@pytest.mark.parametrize(
    ("scales", "asked", "found"),
    [
        ("guidance", {}, (4.0, 1.5)),
        ("guidance", {"guidance": 0.0}, (0.0, 1.5)),
        ("both", {"guidance": 2.0}, (2.0, 1.5)),
        ("both", {"true_cfg": 0.0}, (4.0, 0.0)),
        ("true_cfg", {}, (1.5, 1.5)),
        ("true_cfg", {"guidance": 3.0}, (3.0, 3.0)),
        ("true_cfg", {"true_cfg": 2.0}, (2.0, 2.0)),
    ],
)
def test_a_model_that_is_told_no_guidance_takes_either_name_for_the_real_one(scales, asked, found):
    job = fill(Request(prompt="a", **asked), DEFAULTS, scales)
    assert (job.guidance, job.true_cfg) == found


def test_jobs_are_put_together_as_they_were_taken_apart():
    latents = np.random.default_rng(0).standard_normal((3, 1, 2, 2, 4)).astype(np.float32)
    whole = fill(Request(prompt=["a", "b", "c"], image=pictures(3), latents=latents, seed=2), DEFAULTS, "guidance")
    again = joined([whole.single(index) for index in (2, 0, 1)])
    assert again.prompts == ["c", "a", "b"] and again.seeds == [4, 2, 3]
    assert [whole.images.index(image) for image in again.images] == [2, 0, 1] and again.last_images is None
    np.testing.assert_array_equal(again.latents, latents[[2, 0, 1]])
    assert again.shared() == whole.shared()
    with pytest.raises(ValueError, match="differ in more than their samples"):
        joined([whole.single(0), replace(whole, steps=8).single(1)])
