"""docs/distillation.md from a folder of videos to a four-step model: every command as written, but that all is less."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from train.stages import MODULES

DOCS = Path(__file__).parents[2] / "docs"
MODULE_OF = MODULES | {"dit-convert": "convert.cli", "dit-generate": "infer.generate"}
LESS = {"--clips": "8", "--samples": "2", "--steps": "2"}
ELSEWHERE = ("train.miniature", "a14b")  # hours, or a model that is not there; both are tested for themselves


def commands():
    """The indented lines of the page."""
    lines = (DOCS / "distillation.md").read_text().splitlines()
    found = [line.strip() for line in lines if re.match(r"    (python|dit-|head)", line)]
    return [line for line in found if not any(word in line for word in ELSEWHERE)]


def shortened(line):
    """The words of a command by this Python, with fewer clips, samples and steps."""
    program, *words = shlex.split(line)
    for option, value in LESS.items():
        if option in words:
            words[words.index(option) + 1] = value
    if program == "dit-train":
        words += [word for setting in ("steps=2", "batch=4", "warmup=1") for word in ("--set", setting)]
    if program == "dit-generate" and "stage3" not in line:
        words += ["--steps", "2"]
    if program == "head":
        return [program, *words]
    return [sys.executable, *(words if program == "python" else ["-m", MODULE_OF[program], *words])]


@pytest.mark.long
def test_every_command_runs(tmp_path):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(DOCS.parent)}
    lines = commands()
    assert len(lines) == 12 and any("step_distill" in line for line in lines) and "to-torch" in lines[-1]
    for line in lines:
        ended = subprocess.run(
            shortened(line), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
        )
        assert ended.returncode == 0, f"{line}\n{ended.stdout[-1000:]}\n{ended.stderr[-3000:]}"
    for made in ("routed.mp4", "four-steps.mp4", "stack.json", "stage2-torch/methods/router/weights.safetensors"):
        assert (tmp_path / made).stat().st_size > 0
