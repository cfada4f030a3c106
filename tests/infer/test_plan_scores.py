"""What becomes of a suite's pictures under each plan. The models here draw real clips themselves."""

from types import SimpleNamespace

import numpy as np
import pytest
from drawer import Drawer

from infer import plan_bench
from infer.plan_runs import PlanJobs
from infer.plan_scores import plan_scores
from infer.similarity import psnr, ssim

pytestmark = pytest.mark.usefixtures("quick_reader")


def _plan(pipe, text="dense", steps=12):
    return PlanJobs(pipe=pipe, jobs=[SimpleNamespace(plan=text, steps=steps, solver="euler")])


def _darker(clip):
    return (clip * 0.8).astype(np.uint8)


def _options(*words):
    return plan_bench.parser().parse_args(["--suite", "moving-digits", "--samples", "3", "--seeds", "2", *words])


def test_every_plan_is_scored_and_compared_with_the_first():
    dense, darker = Drawer(), Drawer(_darker)
    darker.name = "darker"
    plans = {"dense": _plan(dense), "hsa:25": _plan(darker, "hsa:25", 20)}
    first, second = plan_scores(plans, _options(), print)
    assert (first["psnr"], first["margins"]["psnr"], first["videos"]) == (100, 0, 6)
    assert len(dense.calls) == len(darker.calls) == 6
    assert [settings["plan"] for _, settings in darker.calls] == ["hsa:25"] * 6
    clips = [dense(prompts, **settings).frames[0] for prompts, settings in list(dense.calls)]
    assert second["psnr"] == pytest.approx(np.mean([psnr(_darker(clip), clip) for clip in clips]))
    assert second["ssim"] == pytest.approx(np.mean([ssim(_darker(clip), clip) for clip in clips]))
    assert 0 < second["margins"]["psnr"] < 2 and second["margins"].keys() >= {"digit", "all", "frechet", "ssim"}
    assert first["direction"] == second["ceiling"]["direction"] == 1


def test_what_all_plans_are_told_is_told_to_their_samples():
    drawer = Drawer()
    [_] = plan_scores({"dense": _plan(drawer)}, _options("--shift", "7", "--guidance", "2.5"), print)
    assert {(settings["shift"], settings["guidance"]) for _, settings in drawer.calls} == {(7, 2.5)}


def test_samples_that_were_kept_are_not_made_again(tmp_path):
    words = ("--keep", str(tmp_path))
    first = list(plan_scores({"dense": _plan(Drawer())}, _options(*words), print))
    again = Drawer()
    assert list(plan_scores({"dense": _plan(again)}, _options(*words), print)) == first
    assert again.calls == []
