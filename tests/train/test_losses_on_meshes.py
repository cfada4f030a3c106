"""Losses of distillation on eight fake devices: what they are on one."""

import json
from pathlib import Path

import pytest
from fake_devices import printed


@pytest.mark.long
def test_meshes_make_what_one_device_makes():
    script = Path(__file__).with_name("losses_on_eight_devices.py")
    errors = json.loads(printed(script))
    assert len(errors) == 7
    for name, (of_value, of_gradients) in errors.items():
        assert of_value <= 1e-5 and of_gradients <= 1e-4, (name, of_value, of_gradients)
