"""What must work on any supported Python and jax, without torch: the shipped model, from the command line to the
file."""

import json

import av
import numpy as np

from infer import load_pipeline
from infer.generate import main
from infer.media import read_metadata

PROMPT = "a red 7 moving left above a blue 2 on a striped background"


def test_the_shipped_model_makes_a_video(tmp_path, capsys):
    out, sheet = tmp_path / "seven.mp4", tmp_path / "seven.png"
    assert main(["--prompt", PROMPT, "--steps", "2", "--out", str(out), "--sheet", str(sheet), "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["steps"] == 2 and report["tokens"] == 320 and report["out"] == [str(out)]
    with av.open(str(out)) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == 17 and frames[0].shape == (128, 128, 3) and np.std(frames) > 5
    assert sheet.stat().st_size > 10_000
    assert read_metadata(out)["prompt"] == PROMPT


def test_the_python_interface():
    result = load_pipeline("demo-wan")(PROMPT, steps=1, seed=3)
    assert result.frames.shape == (1, 17, 128, 128, 3) and result.frames.dtype == np.uint8
    assert result.latents.shape == (1, 5, 16, 16, 16) and result.latents.dtype == np.float32
