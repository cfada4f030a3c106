"""Two real processes that train one model: the weights of one process, a stop that both agree on, exact resume."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_devices import environment
from joined_processes import joined

from dit_jax.config import UserError
from train import hosts
from train.checkpoints import load_ema, newest_step


def started(out, steps, *more, count=2):
    """The processes of a run."""
    return processes_of("two_processes.py", *map(str, (out, steps, *more)), count=count, devices=2 // count)


def processes_of(script, *words, count, devices):
    """That many processes of a script with so many devices each, which find each other on a free port."""
    command = [sys.executable, str(Path(__file__).parent / script), *words]
    return joined(command, environment(devices), count)


def ended(processes):
    """What each of them says at its end."""
    told = []
    for process in processes:
        out, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors[-3000:]
        told.append(json.loads(out.splitlines()[-1]))
    return told


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two processes from its beginning to its end."""
    out = tmp_path_factory.mktemp("whole")
    return ended(started(out, 4)), out


def test_two_processes_train_the_weights_of_one(whole, tmp_path):
    told, out = whole
    assert [each["steps"] for each in told] == [4, 4]
    assert told[0]["replicated"] == told[1]["replicated"]
    ended(started(tmp_path, 4, count=1))
    left, right = load_ema(out), load_ema(tmp_path)
    for name in right:
        np.testing.assert_allclose(left[name], right[name], rtol=1e-4, atol=1e-6, err_msg=name)


MESHES = ("fsdp=4:8", "fsdp=4:4", "data=2,fsdp=2:4", "data=2,context=2:4", "context=2,data=2:8")


def test_a_process_gives_the_rows_that_its_devices_hold():
    """Also where several processes work on the same rows, as on a slice with more hosts than rows."""
    told = ended(processes_of("rows_of_processes.py", *MESHES, count=2, devices=2))
    (alone,) = ended(processes_of("rows_of_processes.py", *MESHES, count=1, devices=4))
    for words in MESHES:
        rows = int(words.rpartition(":")[2])
        assert alone[words][0] == list(range(rows))
        assert sorted({row for each in told for row in each[words][0]}) == list(range(rows))
        for each in told:
            np.testing.assert_allclose(each[words][1:], alone[words][1:], rtol=1e-4, err_msg=words)
    assert told[0]["fsdp=4:4"][0] == told[1]["fsdp=4:4"][0] == [0, 1, 2, 3], "two rows a microbatch, four devices"
    assert told[0]["fsdp=4:8"][0] == [0, 1, 4, 5] and told[1]["fsdp=4:8"][0] == [2, 3, 6, 7]


def test_one_process_writes_weights_while_the_others_wait(tmp_path):
    first, second = ended(processes_of("written_by_one.py", str(tmp_path), count=2, devices=1))
    assert first == [np.arange(12).reshape(2, 3, 2).tolist()] * 2 and second == []


def test_who_is_done_waits_for_the_others(whole):
    first, second = whole[0]
    assert second["left"] >= first["came"], "both clocks are the machine's"


def test_a_stop_before_the_first_step_of_a_run_that_goes_on_is_not_lost(tmp_path):
    ended(started(tmp_path, 4))
    processes = started(tmp_path, 2000)
    assert processes[1].stdout.readline() == "joined\n"
    processes[1].send_signal(signal.SIGTERM)
    told = ended(processes)
    assert [each["stopped"] for each in told] == [True, True]
    assert told[0]["steps"] == told[1]["steps"] == newest_step(tmp_path) < 20


def test_a_stop_between_a_save_and_the_next_step_of_a_run_that_goes_on_is_not_late(whole, tmp_path):
    """Orbax, too, tells jax's service of a step that it saves: of 6 here, of which the loop has taken 2."""
    shutil.copytree(whole[1], tmp_path, dirs_exist_ok=True)
    told = ended(started(tmp_path, 60, 6))
    assert [each["stopped"] for each in told] == [True, True]
    assert told[0]["steps"] == told[1]["steps"] == newest_step(tmp_path)
    assert told[0]["steps"] in (7, 8)


def test_a_lone_task_of_a_cluster_keeps_all_its_devices(monkeypatch):
    monkeypatch.delenv(hosts.ADDRESS, raising=False)
    monkeypatch.setattr(hosts.jax.distributed, "initialize", lambda: pytest.fail("nothing is to be joined"))
    monkeypatch.setenv("SLURM_NTASKS", "1")
    hosts.join()


def test_a_cluster_that_jax_knows_is_joined(monkeypatch):
    """On a TPU machine nothing need be in the environment: jax asks the machine's own service."""
    calls = []
    monkeypatch.delenv(hosts.ADDRESS, raising=False)
    monkeypatch.setattr(hosts.jax.distributed, "initialize", lambda *told: calls.append(told))
    hosts.join()
    assert calls == [()]


def test_a_process_without_a_cluster_is_alone():
    asked = "from train.hosts import join; join(); import jax; print(jax.process_count())"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}
    ended = subprocess.run([sys.executable, "-c", asked], env=environment, capture_output=True, text=True, timeout=120)
    assert ended.stdout.strip() == "1", ended.stderr


def test_what_keeps_processes_apart_is_told(monkeypatch):
    def broken():
        raise ValueError("process_id is 3 of 2")

    monkeypatch.delenv(hosts.ADDRESS, raising=False)
    monkeypatch.setattr(hosts.jax.distributed, "initialize", broken)
    with pytest.raises(ValueError, match="3 of 2"):
        hosts.join()


def test_both_stop_at_one_step_when_one_is_told_to_and_go_on_bit_for_bit(whole, tmp_path):
    processes = started(tmp_path, 2000)
    for line in processes[0].stdout:
        if line.split()[:2] == ["step", "3"]:
            break
    processes[1].send_signal(signal.SIGTERM)
    told = ended(processes)
    assert [each["stopped"] for each in told] == [True, True]
    assert told[0]["steps"] == told[1]["steps"] == newest_step(tmp_path) >= 3
    steps = told[0]["steps"] + 2
    resumed = ended(started(tmp_path, steps))
    straight = ended(started(tmp_path / "straight", steps))
    assert [each["shard"] for each in resumed] == [each["shard"] for each in straight]
    assert resumed[0]["replicated"] == straight[0]["replicated"]


@pytest.mark.long
def test_a_host_that_dies_takes_the_others_with_it_and_all_go_on_bit_for_bit(tmp_path):
    processes = started(tmp_path, 2000)
    for line in processes[0].stdout:
        if line.split()[:2] == ["step", "5"]:
            break
    processes[1].kill()
    processes[0].communicate(timeout=300)
    assert processes[0].returncode != 0
    steps = newest_step(tmp_path) + 3
    resumed, straight = ended(started(tmp_path, steps)), ended(started(tmp_path / "straight", steps))
    assert [each["shard"] for each in resumed] == [each["shard"] for each in straight]


@pytest.mark.parametrize(
    ("count", "number", "expected"), [("2", None, "JAX_PROCESS_ID is ''"), ("2", "2", "is 2, expected 0 to")]
)
def test_half_told_processes_are_refused(monkeypatch, count, number, expected):
    monkeypatch.setenv(hosts.ADDRESS, "127.0.0.1:1")
    monkeypatch.setenv(hosts.COUNT, count)
    if number is not None:
        monkeypatch.setenv(hosts.NUMBER, number)
    with pytest.raises(UserError, match=expected):
        hosts.join()
