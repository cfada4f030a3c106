"""The container's entry point in docs/pods/jobset.yaml, run by two processes: stopped, started again, ended."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from joined_processes import joined
from small_wan import tiny_wan, write_data

from convert.checkpoint import open_checkpoint
from infer.prune import main as prune
from train.checkpoints import newest_step

MANIFEST = Path(__file__).parents[2] / "docs" / "pods" / "jobset.yaml"
STEPS = 300
SMALL = ["mesh=data=2", f"steps={STEPS}", "batch=2", "log_every=1", "save_every=1000", "dtype=float32", "remat=none"]


def container_command(root):
    """Its words, with this folder as the volume /data and options of a small run behind the manifest's own."""
    (replicated,) = yaml.safe_load(MANIFEST.read_text())["spec"]["replicatedJobs"]
    (container,) = replicated["template"]["spec"]["template"]["spec"]["containers"]
    program, *words = [*container["command"], *container["args"]]
    here = [word.replace("/data", str(root)) for word in words]
    return [str(Path(sys.executable).with_name(program)), *here, *(f"--set={each}" for each in SMALL)]


def start(command, root):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "HF_HUB_OFFLINE": "1"}
    return joined(command, environment, cwd=root)


def ended(processes):
    """Exit codes, and what was said."""
    said = [process.communicate(timeout=600)[1] for process in processes]
    return [process.returncode for process in processes], "\n".join(said)[-3000:]


def lines(root):
    log = root / "runs" / "pare-stage1" / "metrics.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


@pytest.mark.long
def test_the_containers_command_is_stopped_and_goes_on(tmp_path):
    whole = tmp_path / "Wan2.1-T2V-14B-Diffusers"
    tiny_wan().text_to_video().save_pretrained(whole)
    assert prune(["--model", str(whole), "--heads", "0", "--ffn", "0.5", "--out", str(tmp_path / "pruned")]) == 0
    write_data(tmp_path / "latents", str(whole))
    command = container_command(tmp_path)

    processes = start(command, tmp_path)
    while len(lines(tmp_path)) < 5 and all(process.poll() is None for process in processes):
        time.sleep(0.1)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    codes, said = ended(processes)
    assert codes == [75, 75], said
    stopped = newest_step(tmp_path / "runs" / "pare-stage1")
    assert 0 < stopped < STEPS and not (tmp_path / "stage1").exists()

    codes, said = ended(start(command, tmp_path))
    assert codes == [0, 0], said
    steps = [line["step"] for line in lines(tmp_path) if "loss" in line]
    assert steps == list(range(1, STEPS + 1)) and np.isfinite([line["loss"] for line in lines(tmp_path)[1:-1]]).all()
    assert open_checkpoint(tmp_path / "stage1").is_pipeline
