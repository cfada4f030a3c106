"""Losses of distillation on eight fake devices: what they are on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.long
def test_meshes_make_what_one_device_makes():
    script = Path(__file__).with_name("losses_on_eight_devices.py")
    flags = "--xla_force_host_platform_device_count=8"
    run = subprocess.run(
        [sys.executable, str(script)], env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    errors = json.loads(run.stdout.splitlines()[-1])
    assert len(errors) == 4
    for name, (of_value, of_gradients) in errors.items():
        assert of_value <= 1e-5 and of_gradients <= 1e-4, (name, of_value, of_gradients)
