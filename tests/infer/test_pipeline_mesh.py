"""The same request gives the same pixels on one device and on eight, alone and in a batch."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from eight_devices import IMAGE, PROMPTS, SMALL, WIDE, wide_latents

from infer import load_pipeline
from infer.request import Request

MESHES = ("data=2,context=4", "fsdp=4,tensor=2")


@pytest.fixture(scope="module")
def on_eight(text_to_video, image_to_video, tmp_path_factory):
    out = tmp_path_factory.mktemp("mesh") / "found.npz"
    flags = "--xla_force_host_platform_device_count=8"
    script = Path(__file__).with_name("eight_devices.py")
    run = subprocess.run(
        [sys.executable, str(script), str(text_to_video[0]), str(image_to_video[0]), str(out), *MESHES],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
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
def test_a_second_request_compiles_nothing(on_eight, mesh):
    assert on_eight[f"{mesh} compiled"] == 0
    assert on_eight[f"{mesh} batch compiled"] == 0


@pytest.mark.parametrize("mesh", MESHES)
def test_every_stage_of_a_batch_is_one_program(on_eight, mesh):
    assert on_eight[f"{mesh} batch programs"] == len(["text", "segment", "decode"])


@pytest.mark.parametrize("mesh", MESHES)
def test_all_devices_share_a_picture(on_eight, pipe, mesh):
    assert on_eight[f"{mesh} wide shard"].tolist() == [1, 1, 60, 13, 4]
    alone = pipe.decode(pipe.prepare(Request(prompt="a red cat", **WIDE)), wide_latents()).frames[0]
    assert np.abs(on_eight[f"{mesh} wide"].astype(int) - alone).max() <= 1


def test_image_to_video_is_the_same(on_eight, image_to_video):
    alone = load_pipeline(image_to_video[0])(PROMPTS, image=IMAGE, seed=6, steps=2, **SMALL).frames
    assert np.abs(on_eight[f"{MESHES[0]} image"].astype(int) - alone).max() <= 1
    assert on_eight[f"{MESHES[0]} image shard"].tolist() == [1, 5, 16, 48, 3]
