"""The training loop: exact resume, SIGTERM, divergence, metrics."""

import json
import os
import signal
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from fake_devices import printed
from flax import nnx

from dit_jax.config import UserError
from train import watch
from train.checkpoints import load_ema, newest_step
from train.loop import Hook, RunConfig, TrainingDivergedError, train
from train.losses import PartMean
from train.optimizers import adam
from train.placement import training_mesh
from train.step import TrainStep, alone


class Line(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(jnp.ones((3, 2)))


def noisy_squares(model, batch, key):
    noise = jax.random.normal(key, batch["y"].shape)
    error = jnp.square(batch["x"] @ model.kernel[...] - batch["y"] + noise)
    return jnp.mean(error), {"error_by_block": jnp.mean(error, axis=0)}


def batch_at(position):
    rng = np.random.default_rng(position)
    return {"x": rng.normal(size=(8, 3)).astype(np.float32), "y": rng.normal(size=(8, 2)).astype(np.float32)}


def run(out, steps, *, batch_at=batch_at, hooks=(), facts=None, **options):
    config = RunConfig(**{"out": str(out), "steps": steps, "log_every": 1, "save_every": 3} | options)
    step = TrainStep(Line(), alone(noisy_squares, adam(0.05)), training_mesh(config.mesh))
    return train(config, step.init(Line()), step, batch_at, hooks, facts=facts)


def values(state):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    straight = run(tmp_path / "straight", 6)
    run(tmp_path / "resumed", 3)
    seen = []
    resumed = run(tmp_path / "resumed", 6, batch_at=lambda position: seen.append(position) or batch_at(position))
    assert seen == [3, 4, 5]
    assert len(values(straight.state)) == len(values(resumed.state))
    for left, right in zip(values(straight.state), values(resumed.state), strict=True):
        np.testing.assert_array_equal(left, right)


def test_the_saved_key_wins_over_another_seed(tmp_path):
    straight = run(tmp_path / "straight", 6)
    run(tmp_path / "resumed", 3)
    resumed = run(tmp_path / "resumed", 6, seed=1)
    np.testing.assert_array_equal(straight.state.params["kernel"], resumed.state.params["kernel"])


def test_a_run_that_goes_on_with_other_options_is_told(tmp_path):
    run(tmp_path, 3, save_every=3)
    with pytest.warns(UserWarning, match=r"goes on from step 3 with steps=6 instead of 3, seed=1 instead of 0: this"):
        run(tmp_path, 6, seed=1, keep=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(tmp_path, 6, seed=1, keep=1, mesh="data=1")


def test_a_finished_run_is_not_run_again(tmp_path):
    first = run(tmp_path, 3)
    again = run(tmp_path, 3, batch_at=lambda position: pytest.fail("no batch is needed"))
    np.testing.assert_array_equal(first.state.params["kernel"], again.state.params["kernel"])


def test_the_mean_of_the_weights_can_be_read_back(tmp_path):
    outcome = run(tmp_path, 4)
    assert newest_step(tmp_path) == 4
    np.testing.assert_array_equal(load_ema(tmp_path)["kernel"], outcome.state.ema["kernel"])


def test_reading_a_run_without_checkpoints_is_told(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        load_ema(tmp_path)


def test_divergence_names_the_step_and_saves_the_state_before_it(tmp_path):
    def poisoned(position):
        batch = batch_at(position)
        return batch if position < 4 else {**batch, "y": batch["y"] * np.nan}

    with pytest.raises(TrainingDivergedError, match=r"at step 4: gradient_norm is nan, loss is nan") as told:
        run(tmp_path / "poisoned", 9, batch_at=poisoned)
    batch = tmp_path / "poisoned" / "diverged-4-0.npz"
    assert f"its batch is in {batch}, and the weights before it are saved" in str(told.value)
    assert newest_step(tmp_path / "poisoned") == 4
    run(tmp_path / "sound", 4)
    np.testing.assert_array_equal(load_ema(tmp_path / "poisoned")["kernel"], load_ema(tmp_path / "sound")["kernel"])
    with np.load(tmp_path / "poisoned" / "diverged-4-0.npz") as kept:
        np.testing.assert_array_equal(kept["x"], batch_at(4)["x"])


def test_divergence_names_the_term(tmp_path):
    def of_terms(model, batch, key):
        terms = {"loss_data": jnp.mean(model.kernel[...]), "loss_motion": jnp.log(0.5 - model.kernel[0, 0])}
        return sum(terms.values()), terms

    step = TrainStep(Line(), alone(of_terms, adam(0.05)), training_mesh())
    with pytest.raises(TrainingDivergedError, match="loss is nan, loss_motion is nan, expected") as told:
        train(RunConfig(out=str(tmp_path), steps=2), step.init(Line()), step, batch_at)
    assert "loss_data" not in str(told.value)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_divergence_on_a_saving_step_saves_the_state_before_it(tmp_path, value):
    def poisoned(position):
        batch = batch_at(position)
        return batch if position < 2 else {**batch, "y": np.full_like(batch["y"], value)}

    with pytest.raises(TrainingDivergedError, match=f"at step 2: gradient_norm is (nan|inf), loss is {value}"):
        run(tmp_path, 9, batch_at=poisoned)
    assert newest_step(tmp_path) == 2


def test_divergence_of_the_gradient_saves_nothing(tmp_path):
    """The square root of nothing has a loss and no gradient."""

    def root(model, batch, key):
        return jnp.sqrt(jnp.sum(jnp.square(model.kernel[...] * 0))) + 1.0, {}

    config = RunConfig(out=str(tmp_path), steps=2, save_every=1)
    step = TrainStep(Line(), alone(root, adam(0.05)), training_mesh())
    with pytest.raises(TrainingDivergedError, match=r"at step 0: gradient_norm is nan.*there was no step before it"):
        train(config, step.init(Line()), step, batch_at)
    assert newest_step(tmp_path) is None


def test_a_signal_inside_a_hook_saves(tmp_path):
    hook = Hook(4, lambda state, taken: os.kill(os.getpid(), signal.SIGTERM))
    outcome = run(tmp_path, 100, hooks=(hook,))
    assert outcome.stopped
    assert newest_step(tmp_path) == outcome.steps == 4


@pytest.mark.parametrize("name", ["log_every", "save_every"])
def test_an_interval_of_no_steps_is_told(tmp_path, name):
    config = RunConfig(out=str(tmp_path), **{name: 0})
    with pytest.raises(UserError, match="0 steps, expected 1 or more"):
        train(config, None, None, batch_at)


@pytest.mark.parametrize("keep", [0, -1])
def test_a_run_that_would_keep_no_checkpoint_is_refused(keep):
    with pytest.raises(UserError, match=f"keep is {keep}: expected 1 or more"):
        RunConfig(keep=keep)


def test_what_only_the_host_reads_is_saved_from_the_host(tmp_path):
    """An array of a device could be restored only where a device has the same name."""
    run(tmp_path, 3)
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.metadata(tmp_path / "checkpoints" / "3" / "state").item_metadata.tree
    assert tree["position"].sharding is None
    assert tree["key"].sharding is None
    assert tree["params"]["kernel"].sharding is not None


def test_metrics_and_hooks_are_logged(tmp_path):
    run(tmp_path, 4, hooks=(Hook(2, lambda state, taken: {"taken_twice": 2.0 * taken}),))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["taken_twice"] for line in lines if "taken_twice" in line] == [4.0, 8.0]
    losses = [line["step"] for line in lines if "loss" in line]
    assert losses == [1, 2, 3, 4]
    means = [np.mean(line["error_by_block"]) for line in lines if "loss" in line]
    assert means == pytest.approx([line["loss"] for line in lines if "loss" in line], rel=1e-5)


def test_seconds_are_logged_by_phase(tmp_path):
    """A line is written when the next batch is there; the checkpoint of step 3 is begun behind that step's line."""
    run(tmp_path, 5)
    lines = {line["step"]: line for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())}
    phases = {"seconds_of_data", "seconds_of_compute"}
    assert phases <= lines[2].keys() and phases <= lines[4].keys()
    assert [step for step in lines if "seconds_of_checkpoint" in lines[step]] == [4]
    of_4 = sum(lines[4][name] for name in (*phases, "seconds_of_checkpoint"))
    assert 0 < of_4 <= lines[4]["seconds_per_step"]


def test_the_share_of_the_peak_is_logged_where_the_peak_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "PEAK_FLOPS", {jax.devices()[0].device_kind: 1e9})
    config = RunConfig(out=str(tmp_path), steps=2, log_every=1)
    step = TrainStep(Line(), alone(noisy_squares, adam(0.05)), training_mesh())
    train(config, step.init(Line()), step, batch_at, flops=lambda batch: 5e5)
    first, *others = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert "seconds_per_step" not in first and len(others) == 1, "the first step is compiled"
    for line in others:
        assert line["flops_per_second"] == pytest.approx(5e5 / line["seconds_per_step"], rel=1e-4)
        assert line["mfu"] == pytest.approx(line["flops_per_second"] / 1e9 / jax.device_count(), rel=1e-4)


def test_the_speed_is_that_of_the_steps_since_the_last_line_without_the_first_of_a_run(tmp_path, monkeypatch):
    """One that goes on from step 3, with lines at 4, 8 and 12: the first step takes 100 seconds, each other 2."""
    run(tmp_path, 3)
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now, time=time.time)
    monkeypatch.setattr(watch, "time", clock)
    step = TrainStep(Line(), alone(noisy_squares, adam(0.05)), training_mesh())

    def slow(*arguments):
        clock.now += 2.0 if clock.now else 100.0
        return step(*arguments)

    hook = Hook(7, lambda state, taken: setattr(clock, "now", clock.now + 8.0))
    (tmp_path / "metrics.jsonl").unlink()
    config = RunConfig(out=str(tmp_path), steps=14, log_every=4, save_every=100)
    train(config, step.init(Line()), slow, batch_at, (hook,), flops=lambda batch: 6.0)
    lines = {line["step"]: line for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())}
    assert "seconds_per_step" not in lines[4] and "seconds_of_compute" not in lines[4]
    assert (lines[8]["seconds_per_step"], lines[8]["seconds_of_hooks"]) == (4.0, 2.0)
    assert lines[8]["flops_per_second"] == 1.5
    assert lines[12]["seconds_per_step"] == 2.0 and "seconds_of_hooks" not in lines[12]


def test_a_value_that_is_no_number_is_left_out_of_the_log(tmp_path):
    """The mean over some of the rows, in a step that has none of them."""

    def of_some(model, batch, key):
        few = batch["y"][:, 0] > 1.5
        return jnp.mean(batch["y"] * model.kernel[0, 0]), {"large": PartMean(jnp.sum(few), jnp.sum(few))}

    step = TrainStep(Line(), alone(of_some, adam(0.05)), training_mesh())
    train(RunConfig(out=str(tmp_path), steps=12, log_every=1), step.init(Line()), step, batch_at)
    text = (tmp_path / "metrics.jsonl").read_text()
    found = {line["step"]: line.get("large") for line in map(json.loads, text.splitlines())}
    there = {position + 1: (batch_at(position)["y"][:, 0] > 1.5).any() for position in range(12)}
    assert "NaN" not in text and found == {step: 1.0 if some else None for step, some in there.items()}
    assert len(set(there.values())) == 2


def test_the_log_of_a_fresh_run_begins_with_its_facts(tmp_path):
    for steps in (3, 6):
        run(tmp_path, steps, facts={"kept_heads": 0.7})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(7))
    assert lines[0].keys() == {"step", "time", "kept_heads"} and lines[0]["kept_heads"] == 0.7
    assert not any("kept_heads" in line for line in lines[1:])


def test_a_bar_shows_steps_and_the_loss(tmp_path, capsys):
    for steps in (2, 5):
        run(tmp_path / "named", steps)
        bar = capsys.readouterr().err
        last = json.loads((tmp_path / "named" / "metrics.jsonl").read_text().splitlines()[-1])
        assert f"{steps}/{steps}" in bar and bar.lstrip("\r").startswith("named:")
        assert f"loss={last['smooth_loss']:.4g}"[:8] in bar


def test_tensorboard_has_what_the_log_has(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    run(tmp_path, 3, tensorboard=True, facts={"kept_heads": 0.75})
    (file,) = (tmp_path / "tensorboard").iterdir()
    content, found, place = file.read_bytes(), {}, 0
    while place < len(content):  # each record: its length, a checksum, itself, a checksum
        size = int.from_bytes(content[place : place + 8], "little")
        event = Event.FromString(content[place + 12 : place + 12 + size])
        found |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
        place += size + 16
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert found[0, "kept_heads"] == 0.75
    for line in lines[1:]:
        assert found[line["step"], "loss"] == pytest.approx(line["loss"], rel=1e-5)
        of_blocks = [found[line["step"], f"error_by_block/block_0{block}"] for block in range(2)]
        assert of_blocks == pytest.approx(line["error_by_block"], rel=1e-5)
    assert {tag for _, tag in found} >= {"loss", "gradient_norm", "seconds_per_step", "seconds_of_compute"}


STOPPED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import test_loop
def batch_at(position):
    if position == 5:
        os.kill(os.getpid(), signal.SIGTERM)
    return test_loop.batch_at(position)
outcome = test_loop.run({out!r}, 100000, batch_at=batch_at)
print("stopped", outcome.stopped, outcome.steps)
"""


def test_sigterm_saves_and_ends_well(tmp_path):
    code = STOPPED.format(tests=str(Path(__file__).parent), out=str(tmp_path))
    word, stopped, steps = printed("-c", code, devices=1, timeout=300).split()
    assert (word, stopped) == ("stopped", "True")
    assert newest_step(tmp_path) == int(steps) < 20


ON_A_MESH = """
import sys
sys.path.insert(0, {tests!r})
import test_loop
test_loop.run({out!r}, 3, mesh="data=2")
outcome = test_loop.run({out!r}, 6, mesh="data=2")
print(*outcome.state.params["kernel"].ravel().tolist())
"""


def test_a_run_resumed_on_a_mesh_gives_the_same_weights(tmp_path):
    code = ON_A_MESH.format(tests=str(Path(__file__).parent), out=str(tmp_path / "mesh"))
    found = np.array([float(word) for word in printed("-c", code, devices=2, timeout=300).split()])
    np.testing.assert_allclose(found, np.ravel(run(tmp_path / "one", 6).state.params["kernel"]), rtol=1e-5)


def test_signals_are_as_before_afterwards(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    run(tmp_path, 2)
    assert signal.getsignal(signal.SIGTERM) is before
