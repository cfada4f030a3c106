"""The process that owns a journal, killed at any moment."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import killed_journal
import pytest

import infer.journal
from dit_jax.config import UserError
from infer.journal import Journal


def environment():
    return os.environ | {"PYTHONPATH": str(Path(infer.journal.__file__).parents[1])}


def test_one_process_owns_a_folder(tmp_path):
    journal = Journal(tmp_path / "jobs", quota_bytes=1, lifetime_seconds=1)
    code = "import sys; from infer.journal import Journal; Journal(sys.argv[1], quota_bytes=1, lifetime_seconds=1)"
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "jobs"], env=environment(), capture_output=True, text=True
    )
    assert "belong to a server that is running: expected one server to a folder" in run.stderr.splitlines()[-1]
    with pytest.raises(UserError, match="belong to a server that is running"):
        Journal(tmp_path / "jobs", quota_bytes=1, lifetime_seconds=1)
    journal.close()
    journal.close()
    Journal(tmp_path / "jobs", quota_bytes=1, lifetime_seconds=1).close()


def test_a_kill_before_any_change_to_the_folder(tmp_path):
    command = [sys.executable, killed_journal.__file__, tmp_path / "jobs", "stepwise"]
    run = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    assert int(run.stdout) > 30


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.long)])
def test_kills_at_random_moments(tmp_path, kills):
    folder, said, chance = tmp_path / "jobs", {}, random.Random(kills)
    for number in range(kills):
        log = tmp_path / f"{number}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, killed_journal.__file__, folder],
                env=environment(),
                stdout=output,
                stderr=subprocess.PIPE,
            )
        try:
            until = time.monotonic() + 120
            while not log.stat().st_size and process.poll() is None and time.monotonic() < until:
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.5))
        finally:
            process.kill()
            _, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, errors.decode()[-3000:]
        heard = log.read_text()
        assert heard, "nothing was acknowledged"
        killed_journal.heard(heard, said)
        killed_journal.check(folder, said)
    assert len(said) > kills
