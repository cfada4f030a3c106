"""The same request gives the same pixels on one device and on eight, alone and in a batch."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from infer import load_pipeline

MESHES = ("data=2,context=4", "fsdp=4,tensor=2")


@pytest.fixture(scope="module")
def on_eight(text_to_video, tmp_path_factory):
    out = tmp_path_factory.mktemp("mesh") / "frames.npz"
    flags = "--xla_force_host_platform_device_count=8"
    script = Path(__file__).with_name("eight_devices.py")
    run = subprocess.run(
        [sys.executable, str(script), str(text_to_video[0]), str(out), *MESHES],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return np.load(out)


@pytest.fixture(scope="module")
def on_one(text_to_video):
    return load_pipeline(text_to_video[0])(
        "a red cat runs", seed=7, size=(48, 64), frames=5, steps=8, guidance=3.0
    ).frames[0]


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("kind", ["", " batch"], ids=["alone", "batch"])
def test_pixels_are_the_same(on_eight, on_one, mesh, kind):
    assert np.abs(on_eight[mesh + kind].astype(int) - on_one).max() <= 1
    assert on_one.std() > 10


@pytest.mark.parametrize("mesh", MESHES)
def test_a_second_request_compiles_nothing(on_eight, mesh):
    assert on_eight[f"{mesh} compiled"] == 0
