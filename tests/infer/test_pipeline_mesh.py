"""The same request gives the same pixels on one device and on eight, alone and in a batch."""

import json
from pathlib import Path

import numpy as np
import pytest
from eight_devices import GUIDANCE, IMAGE, LARGE, PROMPTS, SERVED, SMALL, WIDE, wide_latents
from fake_devices import printed

from infer import load_pipeline
from infer.request import Request

MESHES = ("data=2,context=4", "fsdp=4,tensor=2")


@pytest.fixture(scope="module")
def on_eight(text_to_video, image_to_video, text_experts, text_or_image, tmp_path_factory):
    out = tmp_path_factory.mktemp("mesh") / "found.npz"
    script = Path(__file__).with_name("eight_devices.py")
    pipelines = {"text": text_to_video, "image": image_to_video, "experts": text_experts, "first frame": text_or_image}
    folders = json.dumps({name: str(folder) for name, (folder, _) in pipelines.items()})
    printed(script, folders, out, *MESHES)
    return np.load(out)


@pytest.fixture(scope="module")
def pipe(text_to_video):
    return load_pipeline(text_to_video[0])


@pytest.fixture(scope="module")
def on_one(pipe):
    return pipe("a red cat runs", seed=7, steps=8, **SMALL).frames[0]


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("kind", ["", " batch"], ids=["alone", "batch"])
def test_pixels_are_the_same(on_eight, on_one, mesh, kind):
    assert np.abs(on_eight[mesh + kind].astype(int) - on_one).max() <= 1
    assert on_one.std() > 10


@pytest.mark.parametrize("mesh", MESHES)
def test_an_engine_on_eight_serves_the_same(on_eight, pipe, mesh):
    for found, (seed, prompt) in zip(on_eight[f"{mesh} served"], SERVED, strict=True):
        expected = pipe(prompt, seed=seed, steps=8, **SMALL).frames[0, 0]
        assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("mesh", MESHES)
def test_a_second_request_compiles_nothing(on_eight, mesh):
    assert on_eight[f"{mesh} compiled"] == 0
    assert on_eight[f"{mesh} batch compiled"] == 0


@pytest.mark.parametrize("mesh", MESHES)
def test_every_stage_of_a_batch_is_one_program(on_eight, mesh):
    assert on_eight[f"{mesh} batch programs"] == len(["noise", "solver", "segment", "decode"])


@pytest.mark.parametrize("mesh", MESHES)
def test_all_devices_share_a_picture(on_eight, pipe, mesh):
    assert on_eight[f"{mesh} wide shard"].tolist() == [1, 1, 60, 13, 4]
    alone = pipe.decode(pipe.prepare(Request(prompt="a red cat", **WIDE)), wide_latents()).frames[0]
    assert np.abs(on_eight[f"{mesh} wide"].astype(int) - alone).max() <= 1


def test_image_to_video_is_the_same(on_eight, image_to_video):
    alone = load_pipeline(image_to_video[0])(PROMPTS, image=IMAGE, seed=6, steps=2, **SMALL).frames
    assert np.abs(on_eight[f"{MESHES[0]} image"].astype(int) - alone).max() <= 1
    assert on_eight[f"{MESHES[0]} image shard"].tolist() == [1, 5, 16, 48, 3]


def test_two_experts_are_the_same_resident_and_one_at_a_time(on_eight, text_experts):
    told = dict(seed=7, steps=4, **SMALL | dict(guidance=GUIDANCE))
    alone = load_pipeline(text_experts[0])("a red cat runs", **told).frames[0]
    assert np.abs(on_eight["experts"].astype(int) - alone).max() <= 1
    np.testing.assert_array_equal(on_eight["experts one at a time"], on_eight["experts"])
    assert on_eight["experts compiled"] == 0


def test_a_first_frame_that_is_held_is_the_same(on_eight, text_or_image):
    alone = load_pipeline(text_or_image[0])(PROMPTS, image=IMAGE, seed=6, steps=2, **LARGE).frames
    assert np.abs(on_eight["first frame"].astype(int) - alone).max() <= 1
