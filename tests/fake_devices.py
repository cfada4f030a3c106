"""Scripts that tests run in a process of their own, whose CPU counts as several devices."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def environment(devices):
    """Of a process with so many devices, and with a compiler in a hurry: its programs do not run long."""
    hurry = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    flags = f"{hurry} --xla_force_host_platform_device_count={devices}"
    folders = os.pathsep.join(map(str, (TESTS, TESTS.parent)))
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": folders}


def printed(script, *words, devices=8, timeout=900):
    """The last line that a script prints on so many devices."""
    command = [sys.executable, *map(str, (script, *words))]
    run = subprocess.run(command, env=environment(devices), capture_output=True, text=True, timeout=timeout)
    assert run.returncode == 0, run.stderr[-4000:]
    return (run.stdout.splitlines() or [""])[-1]
