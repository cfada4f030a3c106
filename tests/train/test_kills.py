"""Kill -9 at any moment: the run that goes on is the one that was never stopped, and no checkpoint is half of one."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from fake_devices import environment

from train.checkpoints import load_ema, newest_step

FOLDER = Path(__file__).parent


def start(out):
    command = [sys.executable, str(FOLDER / "killed_run.py"), str(out), str(out / "end.npz")]
    out.mkdir(exist_ok=True)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    return subprocess.Popen(command, env=environment(1), **pipes)


def finish(out):
    """Runs to the end; the weights, and the last losses of every step."""
    assert start(out).wait(timeout=300) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    with np.load(out / "end.npz") as weights:
        return dict(weights), {line["step"]: line["loss"] for line in lines if "loss" in line}


def kill_somewhere(out, lottery):
    process, last = start(out), lottery.randrange(40)
    for line in process.stdout:
        if line.startswith("step") and int(line.split()[1]) >= last:
            break
    time.sleep(lottery.uniform(0, 0.1))
    process.kill()
    process.wait()
    process.stdout.close()


def kills(tmp_path, count, seed):
    lottery = random.Random(seed)
    straight, losses = finish(tmp_path / "straight")
    killed = tmp_path / "killed"
    midway = 0
    for _ in range(count):
        kill_somewhere(killed, lottery)
        if newest_step(killed) is not None:
            midway += not (killed / "end.npz").exists()
            assert np.isfinite(load_ema(killed)["kernel"]).all()
        if (killed / "end.npz").exists():
            (killed / "end.npz").unlink()
            check(killed, straight, losses)
            killed = tmp_path / f"killed-{time.monotonic_ns()}"
    check(killed, straight, losses)
    return midway


def check(killed, straight, losses):
    weights, found = finish(killed)
    assert found == losses and sorted(losses) == list(range(1, 41))
    assert any(loss != float(f"{loss:.6g}") for loss in losses.values()), "losses are compared to the last bit"
    for name, leaf in straight.items():
        np.testing.assert_array_equal(weights[name], leaf)


def test_two_kills(tmp_path):
    """In steps 8 and 19 or soon after."""
    assert kills(tmp_path, 2, seed=54) > 0, "no kill came between a checkpoint and the end"


@pytest.mark.long
def test_twenty_kills(tmp_path):
    assert kills(tmp_path, 20, seed=20) > 3, "of the kills too few came between a checkpoint and the end"
