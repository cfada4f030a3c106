"""A server runs for weeks: what one run needs is gone when it ends."""

import gc
from dataclasses import replace

import pytest

from infer.adapt import main as adapt
from infer.loading import load_pipeline
from infer.request import Request

RUNS = 8
PLANS = ("dense", "hsa:groups=40@8/60@4:window=0.5", "teacache:0.3", "taylorseer:n=4:order=1", "ddit:tau=1e9")


@pytest.fixture(scope="module")
def pipe(text_to_video, tmp_path_factory):
    adapted = tmp_path_factory.mktemp("adapted") / "model"
    assert adapt(["--model", str(text_to_video[0]), "--add", "ddit", "--out", str(adapted)]) == 0
    return load_pipeline(adapted)


@pytest.mark.parametrize("plan", PLANS)
def test_a_run_leaves_nothing_behind(pipe, plan):
    job = pipe.prepare(Request(prompt="a red cat", size=(48, 64), frames=5, steps=8, plan=plan))

    def kept(seeds):
        for seed in seeds:
            pipe.denoise(replace(job, seeds=[seed]))
        gc.collect()
        return len(gc.get_objects())

    before = kept(range(2))
    assert kept(range(RUNS)) - before < RUNS
