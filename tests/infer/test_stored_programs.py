"""A second process compiles nothing, on one device, on eight or on some of them, and gives the same numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

CASES = {"part": 1, "": 3, "data=2,context=4": 3}  # and the programs that it needs at least


@pytest.fixture(scope="module")
def processes(text_to_video, tmp_path_factory):
    """[(what it did, numbers)] of a process that fills the store and of one that finds it full."""
    place = tmp_path_factory.mktemp("stored")
    script = Path(__file__).with_name("stored_programs.py")
    # jax's own cache is on: what it has written is compiled, and kept; what it has read could not be.
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(place / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    found = []
    for name in ("cold", "warm"):
        command = [sys.executable, str(script), str(text_to_video[0]), str(place / "store"), str(place / name)]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
        assert run.returncode == 0, run.stderr[-3000:]
        found.append((json.loads((place / f"{name}.json").read_text()), np.load(place / f"{name}.npz")))
    return found


@pytest.mark.parametrize("case", CASES, ids=["some of eight", "one device", "eight"])
def test_a_second_process_compiles_nothing(processes, case):
    cold, warm = (told[case] for told, _ in processes)
    assert cold["compiled"] == cold["programs"] >= CASES[case] and cold["loaded"] == 0
    assert warm["compiled"] == 0 and warm["loaded"] == warm["programs"] == cold["programs"]
    assert warm["peak_bytes"] == cold["peak_bytes"] > 0


def test_numbers_are_the_same(processes):
    (_, cold), (_, warm) = processes
    for case in CASES:
        assert cold[case].std() > 0.1
        np.testing.assert_array_equal(warm[case], cold[case], err_msg=case)


@pytest.mark.parametrize("case", ["", "data=2,context=4"], ids=["one device", "eight"])
def test_nothing_is_lowered_of_what_was_called_before(processes, case):
    cold, warm = (told[case] for told, _ in processes)
    assert len(cold["lowered"]) == cold["programs"]
    assert warm["lowered"] == cold["logged"] == warm["logged"] == []
