"""Plans on eight fake devices: the same result as on one, and one program for all segments."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PLANS = ("hsa:groups=30@12/25@6/45@3:window=0.5", "routing:min=2:max=2")


@pytest.fixture(scope="module")
def told():
    script = Path(__file__).with_name("methods_on_eight_devices.py")
    flags = "--xla_force_host_platform_device_count=8"
    run = subprocess.run(
        [sys.executable, str(script), *PLANS], env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_meshes_make_what_one_device_makes(told):
    assert len(told["errors"]) == len(PLANS) * 3
    assert max(told["errors"].values()) < 1e-5, told["errors"]


def test_all_segments_are_one_program(told):
    assert set(told["programs"].values()) == {1}
