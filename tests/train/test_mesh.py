"""Training a Wan on meshes of every axis: the weights of one device, split, and resumed bit for bit."""

import json
from pathlib import Path

import pytest
from fake_devices import printed


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return json.loads(printed(Path(__file__).with_name("eight_devices.py"), tmp_path_factory.mktemp("runs")))


def test_a_mesh_trains_the_weights_of_one_device(report):
    assert len(report["from_one_device"]) == 4
    assert max(report["from_one_device"].values()) < 1e-4
    assert max(report["ema_from_one_device"].values()) < 1e-4


def test_a_run_resumed_on_another_mesh_trains_the_weights_of_one_device(report):
    assert report["moved_from_one_device"] < 1e-4


def test_muon_on_a_mesh_trains_the_weights_of_one_device(report):
    """Orthogonalised gradients carry rounding of the sums over devices into every weight, so not to fp32 rounding."""
    assert report["muon_from_one_device"] < 1e-2


def test_a_run_resumed_on_a_mesh_is_the_uninterrupted_one(report):
    assert report["resumed_is_equal"]


def test_weights_and_momentum_are_split_over_fsdp_and_tensor(report):
    held = report["held"]
    assert held["data=2,fsdp=4"] == [1 / 4] * len(held["data=2,fsdp=4"])
    assert held["fsdp=2,context=4"] == [1 / 2] * len(held["fsdp=2,context=4"])
    assert held["data=4,tensor=2"] == [1 / 2] * len(held["data=4,tensor=2"])
    assert min(map(len, held.values())) >= 2
