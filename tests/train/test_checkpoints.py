"""Checkpoints: which stay, what they tell of their run, and what becomes of them on a full disk."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from test_loop import Line, batch_at, noisy_squares

from dit_jax.config import UserError
from train.checkpoints import Checkpoints, Kept, code_version, load_ema, newest_step
from train.loop import Hook, RunConfig, train
from train.optimizers import adam, muon
from train.placement import training_mesh
from train.step import TrainStep, alone

SCORES = {1: 0.1, 2: 0.9, 3: 0.3, 4: 0.2, 5: 0.4, 6: 0.5}


def run(out, steps=6, optimizer=None, save_every=1, score_every=1, **options):
    config = RunConfig(out=str(out), steps=steps, save_every=save_every, **options)
    step = TrainStep(Line(), alone(noisy_squares, optimizer or adam(0.05)), training_mesh())
    hook = Hook(score_every, lambda state, taken: {"digit": SCORES[taken]})
    return train(config, step.init(Line()), step, batch_at, (hook,))


def steps_of(out):
    return sorted(int(folder.name) for folder in (out / "checkpoints").iterdir() if folder.name.isdigit())


@pytest.mark.parametrize(("best", "kept"), [("digit", [2, 5, 6]), ("-digit", [1, 5, 6])])
def test_the_last_and_the_best_stay(tmp_path, best, kept):
    run(tmp_path, keep=2, keep_best=1, best=best)
    assert steps_of(tmp_path) == kept


def test_whatever_is_scored_is_saved_where_the_best_stay(tmp_path):
    run(tmp_path, keep=1, keep_best=2, best="digit", save_every=100)
    assert steps_of(tmp_path) == [2, 6]


def test_a_run_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    named, moves = threading.Event(), []

    def slow(move):
        def moved(*args, **kwargs):
            moves.append(move.__name__)
            named.wait(20)
            return move(*args, **kwargs)

        return moved

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, slow(getattr(os, name)))
    step = TrainStep(Line(), alone(noisy_squares, adam(0.05)), training_mesh())
    checkpoints = Checkpoints(tmp_path, Kept(), {"recipe": "x", "options": {}})
    checkpoints.save(step.init(Line()), 1, jax.random.key(0), {})
    assert newest_step(tmp_path) is None
    named.set()
    checkpoints.close()
    assert newest_step(tmp_path) == 1 and moves


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"keep_best": 1}, "keep_best is 1 and best is ''"),
        ({"best": "digit"}, "keep_best is 0 and best is 'digit'"),
        ({"keep_best": 1, "best": "digits"}, "best is 'digits', found digit: expected one of the scores"),
    ],
)
def test_a_best_that_nothing_gives_is_told(tmp_path, options, sentence):
    with pytest.raises(UserError, match=sentence):
        run(tmp_path, save_every=100, **options)


def test_checkpoints_without_a_score_are_none_of_the_best(tmp_path):
    run(tmp_path, keep=1, keep_best=1, best="-digit", score_every=2)
    assert steps_of(tmp_path) == [4, 6], "of 2, 4 and 6, which are scored"


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


def test_the_version_of_the_code_names_the_commit_of_its_own_repository(tmp_path, monkeypatch):
    file = tmp_path / "checkpoints.py"
    file.write_text("x = 1\n")

    def git(*words):
        own = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        told = subprocess.run(["git", "-C", tmp_path, *own, *words], check=True, capture_output=True, text=True)
        return told.stdout.strip()

    git("init", "-q")
    (tmp_path / "other.py").write_text("")
    git("add", "other.py")
    git("commit", "-qm", "other")
    monkeypatch.delenv("DIT_JAX_COMMIT", raising=False)
    plain = code_version(file)
    assert "+" not in plain
    monkeypatch.setenv("DIT_JAX_COMMIT", "abc123")
    assert code_version(file) == f"{plain}+abc123"
    git("add", "checkpoints.py")
    git("commit", "-qm", "own")
    assert code_version(file) == f"{plain}+{git('rev-parse', '--short=12', 'HEAD')}"
    file.write_text("x = 2\n")
    assert code_version(file).endswith(".dirty")


def test_the_running_mean_is_read_without_the_rest(tmp_path, monkeypatch):
    run(tmp_path, 2)
    read = []

    class Spied(ocp.Checkpointer):
        def restore(self, *places, **options):
            found = super().restore(*places, **options)
            read.append(jax.tree.map(np.shape, found))
            return found

    monkeypatch.setattr(ocp, "Checkpointer", Spied)
    assert list(load_ema(tmp_path)) == ["kernel"]
    assert [list(tree) for tree in read] == [["ema"]]


def test_checkpoints_of_another_optimiser_are_told_and_left_alone(tmp_path):
    run(tmp_path, 2)
    before = load_ema(tmp_path)
    with pytest.raises(UserError, match="are of another run: its optimiser differ in"):
        run(tmp_path, 4, optimizer=muon(0.1, 0.1))
    np.testing.assert_array_equal(load_ema(tmp_path)["kernel"], before["kernel"])


def test_checkpoints_of_another_recipe_are_told_and_left_alone(tmp_path):
    run(tmp_path, 2)
    file = tmp_path / "checkpoints" / "2" / "about" / "metadata"
    about = json.loads(file.read_text())
    file.write_text(json.dumps(about | {"recipe": "recipe_finetune"}))
    with pytest.raises(UserError, match=r"of the recipe recipe_finetune, expected the recipe train\.loop; give"):
        run(tmp_path, 4)
    assert steps_of(tmp_path) == [1, 2]


def test_a_state_makes_room_for_the_one_that_is_read(tmp_path):
    run(tmp_path, 2)
    step = TrainStep(Line(), alone(noisy_squares, adam(0.05)), training_mesh())
    given = step.init(Line())
    saved = Checkpoints(tmp_path, Kept(), {"recipe": "train.loop"})
    restored, position, _ = saved.restore(given, jax.random.key(0))
    assert position == 2 and not any(leaf.is_deleted() for leaf in jax.tree.leaves(restored))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((given.params, given.opt_state, given.ema)))


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
