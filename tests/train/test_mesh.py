"""Training a Wan on meshes of every axis: the weights of one device, split, and resumed bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Eight devices, and a compiler in a hurry.
XLA_FLAGS = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true"
)
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": XLA_FLAGS}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    command = [sys.executable, Path(__file__).with_name("eight_devices.py"), tmp_path_factory.mktemp("runs")]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT}, timeout=900)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


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
