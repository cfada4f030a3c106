"""Plans on eight fake devices: the same result as on one, and one program for all segments."""

import json
from pathlib import Path

import pytest
from fake_devices import printed

pytestmark = pytest.mark.long

# Largest relative error. Of coherences that are nearly the same a mesh's rounding may skip the other.
PLANS = {
    "hsa:groups=30@12/25@6/45@3:window=0.5": 1e-5,
    "coredit:0.5": 1e-3,
    "teacache:1.0": 1e-5,
    "taylorseer:n=3": 1e-5,
    "routing:min=2:max=2": 1e-5,
}


@pytest.fixture(scope="module")
def told():
    script = Path(__file__).with_name("methods_on_eight_devices.py")
    return json.loads(printed(script, *PLANS))


def test_meshes_make_what_one_device_makes(told):
    assert len(told["errors"]) == len(PLANS) * 3
    for plan, most in PLANS.items():
        errors = {name: error for name, error in told["errors"].items() if name.startswith(plan)}
        assert max(errors.values()) < most, errors


def test_all_segments_are_one_program(told):
    assert set(told["programs"].values()) == {1}
