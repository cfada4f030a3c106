"""`dit-bench` on a random model and on a tiny pipeline: its rows, its picture, and how it refuses."""

import json
import math
import re
from dataclasses import replace

import jax
import numpy as np
import pytest
from PIL import Image

from dit_jax.config import UserError
from dit_jax.flops import Shape, dense_work, plan_cost, step_cost
from dit_jax.methods.method import RunRecord
from dit_jax.methods.plan import parse_plan
from dit_jax.models.flux import FLUX_DEV
from dit_jax.models.wan import WAN_1_3B
from infer import plan_bench, random_pipeline
from infer.bench_entries import parse_entries
from infer.bench_page import qualities_of, series
from infer.plan_runs import PlanJobs, Recorder, rows, run_plans
from infer.random_pipeline import RandomKind, RandomPipeline, sized_pipeline, token_grid
from infer.request import Defaults, Request

HSA = "hsa:groups=25@4/75@2:window=0.5:ranking=random"
PROMISED = {"plan", "seconds", "predicted_speedup", "measured_speedup", "efficiency", "peak_bytes"}


def test_rows_of_a_random_model(tmp_path, capsys):
    out, plot = tmp_path / "deep" / "out.json", tmp_path / "out.png"
    arguments = ["--random", "32x2x64", "--steps", "4", "--plans", HSA, "--rounds", "1", "--attention"]
    assert plan_bench.main([*arguments, "--json", str(out), "--plot", str(plot)]) == 0
    rows = json.loads(out.read_text())
    assert [row["plan"] for row in rows] == ["dense", HSA]
    assert all(row.keys() >= PROMISED for row in rows)
    dense, hsa = rows
    assert (dense["predicted_speedup"], dense["measured_speedup"], dense["efficiency"]) == (1, 1, 1)
    assert dense["steps"] == hsa["steps"] == 4 and hsa["predicted_speedup"] > 1
    assert {row["solver"] for row in rows} == {"euler"} and dense["tokens"] == 64
    for row in rows:
        assert row["efficiency"] == pytest.approx(row["measured_speedup"] / row["predicted_speedup"])
        assert row["measured_speedup"] == pytest.approx(dense["seconds"] / row["seconds"])
        assert 0 < row["compile_seconds"] < row["cold_seconds"] and row["seconds"] < row["compile_seconds"]
        speedups = row["attention_measured_speedup"], row["attention_predicted_speedup"]
        assert row["attention_efficiency"] == pytest.approx(speedups[0] / speedups[1])
        assert row["psnr"] is None and row["end_to_end_seconds"] is None
    assert hsa["peak_bytes"] > dense["peak_bytes"] > 4 * 2 * 12 * 32**2, "its cache, and the weights"
    printed = capsys.readouterr()
    assert printed.err.count("first run") == 4 and "run 1 of 1: dense" in printed.err
    assert "predicted speed-up" in printed.out
    assert Image.open(plot).size == (1200, 750)
    page = plot.with_suffix(".html").read_text()
    assert "data:image/png;base64," in page and not re.search(r'(src|href)="http', page)
    assert page.count("<tr>") == 3 and HSA in page


@pytest.fixture(scope="module")
def random_model():
    return sized_pipeline("32x1x64")


def test_predictions_are_of_what_the_pipeline_runs(random_model):
    pipe = random_model
    job = pipe.prepare(Request(prompt="a", steps=4, guidance=3.0, plan=HSA))
    [method] = parse_plan(HSA).methods
    shape = Shape(tokens=64, text=512, branches=2)
    assert pipe.cost(job) == plan_cost(pipe.transformer_config, shape, (method,), 4)


def test_pictures_are_compared_with_the_dense_ones(text_to_video, tmp_path, capsys):
    out, prompts = tmp_path / "out.json", tmp_path / "prompts.txt"
    prompts.write_text("a red cat runs\n\nthe dog sleeps\n")
    arguments = ["--model", str(text_to_video[0]), "--shape", "48x32x5", "--steps", "3", "--guidance", "1"]
    arguments += ["--plans", "dense:2", "--rounds", "1", "--prompts", str(prompts), "--json", str(out)]
    assert plan_bench.main([*arguments, "--plot", str(tmp_path / "out.png")]) == 0
    dense, fewer = json.loads(out.read_text())
    assert (dense["psnr"], dense["ssim"], dense["samples"]) == (100, pytest.approx(1), 2)
    assert fewer["steps"] == 2 and fewer["predicted_speedup"] == 1.5
    assert 0 < fewer["psnr"] < 60 and fewer["ssim"] < 0.999
    assert dense["end_to_end_seconds"] > dense["seconds"] and dense["solver"] == "unipc"


@pytest.mark.parametrize("backbone", ["wan", "flux", "flux, attention alone"])
def test_a_random_model_of_each_backbone_denoises_to_ordinary_numbers(backbone):
    small = dict(width=32, heads=2, head_width=16, mlp_width=64, text_width=8)
    config = replace(WAN_1_3B, blocks=2, in_channels=36, image_width=12, **small)  # image-to-video
    defaults = Defaults(size=(64, 32), frames=5, steps=2, guidance=3.0)
    if "flux" in backbone:
        config = replace(FLUX_DEV, double_blocks=1, single_blocks=1, rope_widths=(4, 6, 6), pooled_width=6, **small)
        defaults = replace(defaults, frames=1, solver="euler", video=False)
    pipe = RandomPipeline(backbone, config, defaults, kind=RandomKind(attention_only="alone" in backbone))
    job = pipe.prepare(Request(prompt="a"))
    latents = pipe.denoise(job)
    assert 0.1 < np.std(latents) < 30 and latents.shape[-1] == 16
    compiled = pipe.programs.seconds
    np.testing.assert_array_equal(pipe.denoise(job), latents)
    assert pipe.programs.seconds == compiled
    leaves = jax.tree.leaves(pipe.transformer)
    assert all(float(abs(leaf).max()) > 0 for leaf in leaves)


@pytest.mark.parametrize(("tokens", "grid"), [(4096, (4, 32, 32)), (64, (4, 4, 4)), (35, (1, 5, 7)), (26, (2, 1, 13))])
def test_token_grids(tokens, grid):
    assert token_grid(tokens) == grid and math.prod(grid) == tokens


def test_plans_that_need_different_solvers_are_not_timed_together(tmp_path, capsys):
    file = tmp_path / "ddit.json"
    file.write_text('{"tau": 0.02, "rho": 0.5, "steps": 4, "solver": "unipc"}')
    assert plan_bench.main(["--random", "32x2x64", "--steps", "4", "--plans", f"{HSA},ddit:{file}"]) == 2
    assert f"found {HSA} the euler solver, ddit:{file} the unipc solver" in capsys.readouterr().err


def test_plans_run_with_the_solver_that_one_needs(random_model, monkeypatch):
    monkeypatch.setattr(random_model, "defaults", replace(random_model.defaults, solver="unipc"))
    options = plan_bench.parser().parse_args(["--steps", "4"])
    for plans, solver in (("dense", "unipc"), (f"dense,{HSA}", "euler")):
        entries = parse_entries(plans)
        jobs_of = plan_bench._job_maker(random_model, entries, options)
        assert {job.solver for entry in entries for job in jobs_of(random_model, entry)} == {solver}


def test_what_is_drawn_are_the_measures_that_all_have():
    rows = [{"efficiency": 1.0, "psnr": 30.0}, {"efficiency": 0.9, "psnr": None}]
    assert qualities_of(rows) == ["efficiency"]
    assert qualities_of([row | {"psnr": 30.0, "frechet": 2.0} for row in rows]) == ["psnr", "frechet"]


@pytest.mark.parametrize(
    ("plan", "drawn"),
    [("dense", ("dense", "")), ("hsa:50", ("hsa", "50")), ("magcache:0.1:ratios=a/b.json", ("magcache", "0.1")),
     ("coredit:runs/r.json", ("coredit", "r")), ("on:runs/narrow", ("on", "narrow")),
     ("on:runs/routed+routing:min=2:max=3", ("routing", "min=2:max=3")),
     ("coredit:0.3+teacache:0.1", ("coredit", "0.3+teacache:0.1")), ("dense:30", ("dense", "30")),
     ("dense:20+coredit:runs/r.json", ("coredit", "20 steps")), ("dense:20+on:runs/narrow", ("on", "narrow:20 steps")),
     ("dense:20+on:runs/sized+ddit:2p@4-19", ("ddit", "2p@4-19:20 steps"))],
)  # fmt: skip
def test_plans_of_a_method_are_one_line(plan, drawn):
    assert series(plan) == drawn


def test_random_models_serve_routing_patches_and_pruned_widths(tmp_path):
    out = tmp_path / "out.json"
    plans = "dense,routing:min=2:max=2,ddit:2p@1-3,pruned:0.5,pruned:0.5+routing:min=2:max=2"
    words = ["--random", "64x4x64", "--steps", "4", "--rounds", "1", "--plans", plans, "--json", str(out)]
    assert plan_bench.main(words) == 0
    dense, routed, patched, pruned, both = json.loads(out.read_text())
    two_blocks = _blocks_of_a_step(sized_pipeline("64x4x64")) / 2
    assert dense["flops"] - routed["flops"] == pytest.approx(4 * two_blocks)
    assert patched["predicted_speedup"] > 1 and pruned["predicted_speedup"] > 1
    assert both["flops"] < min(routed["flops"], pruned["flops"]) < dense["flops"]
    assert pruned["peak_bytes"] < dense["peak_bytes"]


class _CountedCache:
    """What TeaCache's run leaves: it says how often the blocks have run."""

    def __init__(self, runs):
        self.cache = type("Cache", (), {"residual": type("Residual", (), {"runs": np.int32(runs)})})


def test_what_only_a_run_tells_is_predicted_from_that_run(random_model):
    def cost(plan, record=None):
        return random_model.cost(random_model.prepare(Request(prompt="a", steps=4, plan=plan)), record).flops

    record = RunRecord(4, [_CountedCache(1), _CountedCache(1)], [1, 1, 2, 4])
    plan = "teacache:0.1:model=wan2.1-t2v-1.3b"
    assert cost(plan) == cost("dense") > cost(plan, record) > cost("dense") / 2
    assert cost("ddit") == cost("dense")
    assert cost("ddit", record) == pytest.approx(cost("ddit:2p@2-2/4p@3-3"), rel=1e-12)


def test_the_steps_that_a_cache_runs_are_counted(random_model):
    plan = "teacache:1e9:model=wan2.1-t2v-1.3b"
    plans = {
        name: PlanJobs(pipe=random_model, jobs=[random_model.prepare(Request(prompt="a", steps=4, plan=text))])
        for name, text in (("dense", "dense"), ("first and last", plan))
    }
    dense, cached = rows(run_plans(plans, 1, print), plans)
    saved = 2 * _blocks_of_a_step(random_model)
    assert 0 < saved < dense["flops"] and cached["flops"] == pytest.approx(dense["flops"] - saved)


def test_what_is_recorded_of_a_run_leaves_the_device(random_model):
    plan = "teacache:0.1:model=wan2.1-t2v-1.3b"
    job, recorder = random_model.prepare(Request(prompt="a", steps=4, plan=plan)), Recorder(4)
    random_model.denoise(job, watch=recorder, chosen=recorder.chosen)
    [state] = recorder.record.states
    assert [(type(leaf), leaf.ndim) for leaf in jax.tree.leaves(state)] == [(np.ndarray, 0)], "its number of runs"


def _blocks_of_a_step(pipe):
    shape, config = Shape(tokens=64, text=512), pipe.transformer_config
    whole = dense_work(config, shape)
    without = whole.in_blocks(lambda block: block._replace(share=0))
    return step_cost(config, shape, whole).flops - step_cost(config, shape, without).flops


def test_entries_on_other_models():
    other, both = parse_entries("on:some/folder,pruned:0.3+hsa:25")[1:]
    assert (other.on, other.pruned, str(other.plan), other.steps) == ("some/folder", 0, "dense", None)
    assert (both.on, both.pruned, str(both.plan), both.steps) == (None, 0.3, "hsa:25", 20)


def test_entries_with_steps_of_their_own():
    fewer, cached, elsewhere = parse_entries("dense:12,dense:10+teacache:0.1,on:some/folder+dense:7+ddit:2p@0-3")[1:]
    assert (str(fewer.plan), fewer.steps) == ("dense", 12)
    assert (str(cached.plan), cached.steps, cached.name) == ("teacache:0.1", 10, "dense:10+teacache:0.1")
    assert (str(elsewhere.plan), elsewhere.steps, elsewhere.on) == ("ddit:2p@0-3", 7, "some/folder")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--plans", "dense,magic"], "names 'magic'"),
        (["--plans", "dense,dense"], "names dense twice"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--random", "768x12"], "expected WIDTHxBLOCKSxTOKENS"),
        (["--random", "770x12x64"], "16 divides"),
        (["--preset", "wan9"], "unknown preset 'wan9'"),
        (["--random", "32x1x64", "--suite", "digits"], "random weights make no pictures"),
        (["--plot", "out.svg"], "ends in .png"),
        (["--random", "32x1x64", "--shape", "64"], "expected WIDTHxHEIGHTxFRAMES"),
        (["--random", "32x1x64", "--shape", "64x63x5"], "16 divides"),
        (["--random", "32x1x64", "--plans", HSA, "--solver", "unipc"], "euler solver alone"),
        (["--attention"], "expected --random or --preset"),
        (["--random", "32x1x64", "--attention", "--plans", "ddit:2p@0-1"], "blocks without MLPs"),
        (["--random", "32x1x64", "--plans", "pruned:1.5"], "expected a share from 0"),
        (["--random", "32x1x64", "--plans", "pruned:narrow"], "expected a share behind pruned:"),
        (["--plans", "on:"], "without a model"),
        (["--plans", "dense:10+hsa:25"], "whose plan has 20 steps of its own"),
        (["--plans", "pruned:0.3"], "has no place here"),
        (["--random", "32x1x64", "--plans", "on:folder"], "has no place here"),
        (["--keep", "kept"], "--keep is for a suite's samples"),
        (["--model", "no-such-model"], "no-such-model"),
        (["--json", f"{__file__}/out.json"], "cannot write"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, named, capsys, tmp_path, monkeypatch, random_model):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(random_pipeline, "RandomPipeline", lambda *_, **__: random_model)
    assert plan_bench.main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert named in error and len(error.splitlines()) == 1 and error.startswith("dit-bench: ")
    assert not list(tmp_path.iterdir())


def test_an_unknown_plan_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(plan_bench, "_subject", lambda options: pytest.fail("a model was loaded"))
    with pytest.raises(UserError):
        plan_bench.bench(plan_bench.parser().parse_args(["--plans", "hsa:26"]))
