"""Checkpoints: which stay, what they tell of their run, and what becomes of them on a full disk."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from test_loop import Line, batch_at, noisy_squares

from dit_jax.config import UserError
from train.checkpoints import load_ema, newest_step
from train.loop import Hook, RunConfig, train
from train.optimizers import adam, muon
from train.placement import training_mesh
from train.step import TrainStep, alone

SCORES = {1: 0.1, 2: 0.9, 3: 0.3, 4: 0.2, 5: 0.4, 6: 0.5}


def run(out, steps=6, optimizer=None, **options):
    config = RunConfig(out=str(out), steps=steps, save_every=1, **options)
    step = TrainStep(Line(), alone(noisy_squares, optimizer or adam(0.05)), training_mesh())
    hook = Hook(1, lambda state, taken: {"digit": SCORES[taken]})
    return train(config, step.init(Line()), step, batch_at, (hook,))


def steps_of(out):
    return sorted(int(folder.name) for folder in (out / "checkpoints").iterdir() if folder.name.isdigit())


@pytest.mark.parametrize(("best", "kept"), [("digit", [2, 5, 6]), ("-digit", [1, 5, 6])])
def test_the_last_and_the_best_stay(tmp_path, best, kept):
    run(tmp_path, keep=2, keep_best=1, best=best)
    assert steps_of(tmp_path) == kept


def test_without_a_score_the_last_stay(tmp_path):
    run(tmp_path, keep=3)
    assert steps_of(tmp_path) == [4, 5, 6]


def test_a_checkpoint_tells_what_made_it(tmp_path):
    run(tmp_path, 1, seed=7)
    about = json.loads((tmp_path / "checkpoints" / "1" / "about" / "metadata").read_text())
    assert about["recipe"] == "train.loop"
    assert about["options"]["seed"] == 7
    assert about["code"].startswith("0.")
    assert about["scores"] == {"digit": 0.1}


def test_checkpoints_of_another_optimiser_are_told_and_left_alone(tmp_path):
    run(tmp_path, 2)
    before = load_ema(tmp_path)
    with pytest.raises(UserError, match="are of another run: its optimiser differ in"):
        run(tmp_path, 4, optimizer=muon(0.1, 0.1))
    np.testing.assert_array_equal(load_ema(tmp_path)["kernel"], before["kernel"])


def test_a_full_disk_is_told_and_leaves_the_last_checkpoint_whole(tmp_path):
    script = Path(__file__).with_name("full_disk.py")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(script.parents[2])}
    command = [sys.executable, str(script), str(tmp_path)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 2, ended.stderr[-3000:]
    assert "could not be written" in ended.stdout
    assert "the newest whole one is of step 3; make room" in ended.stdout
    assert newest_step(tmp_path) == 3
    assert np.isfinite(load_ema(tmp_path)["kernel"]).all()
    assert jax.tree.leaves(load_ema(tmp_path))[0].shape == (512, 512)
