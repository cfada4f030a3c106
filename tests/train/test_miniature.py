"""`train.miniature`: its parts are commands that exist, run in order, go on where they stopped, and make a table."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from convert import cli as convert_cli
from dit_jax.config import UserError
from infer import calibrate, evaluate, plan_bench, prune
from infer.paired_scores import write_report
from train import encode, miniature
from train.cli import configure, load_recipe
from train.miniature_stages import SHARE, Study, bench_stage, entries, sampled, stages
from train.miniature_table import ABLATIONS, ROWS, SCORES, report, restore, table
from train.stages import Stage, chosen, run_all


def _study(tmp_path, model="demo-flux", **settings):
    usual = {"samples": 8, "steps": 10, "examples": 16, "length": 0.1, "seed": 3, "blocks": (3, 8), "shift": 2.0}
    return Study(model=model, out=tmp_path, **usual | settings)


PARSERS = {
    "dit-prune": prune.parser,
    "dit-encode": encode.parser,
    "dit-bench": plan_bench.parser,
    "dit-convert": convert_cli.parser,
}


@pytest.mark.parametrize("model", ["demo-flux", "demo-wan"])
def test_every_part_is_a_command_behind_what_it_needs(tmp_path, model):
    there, study = set(), _study(tmp_path, model)
    for stage in [*stages(study), bench_stage(study)]:
        assert stage.name not in there and there >= set(stage.after), stage.name
        there.add(stage.name)
        command, *words = stage.command
        if command == "dit-train":
            recipe = load_recipe(words[0])
            config = configure(recipe.Config, words[2::2], recipe.VARIANTS)
            assert config.export == str(stage.makes) and config.seed == 3 and config.variant == "demo"
        elif command == "dit-eval":
            options = evaluate.parser().parse_args(words)
            assert options.report == stage.makes and (options.against is not None) == (stage.name != "teacher-scores")
        elif command == "dit-calibrate":
            assert calibrate.parser().parse_args(words).out == stage.makes
        elif command in PARSERS:
            PARSERS[command]().parse_args(words)
        else:
            assert command == "python"
    scored = {name.removesuffix("-scores") for name in there if name.endswith("-scores")}
    assert scored >= {*entries(study), *ROWS} and ("stage1-unprotected" in scored) == (model == "demo-wan")
    assert {side for pair in ABLATIONS.values() for side in pair} - scored <= {"stage1-unprotected"}


def test_trainings_that_are_compared_are_as_long(tmp_path):
    of = {stage.name: stage.command for stage in stages(_study(tmp_path))}
    told = {name: [word for word in words if word.startswith("steps=")] for name, words in of.items()}
    steps = {name: int(words[-1].partition("=")[2]) for name, words in told.items() if words}
    assert steps["stage1"] == 240 > steps["stage1-brief"] == steps["stage1-random"] == 30
    assert steps["stage2"] > steps["stage2-brief"] == steps["stage2-time"] > steps["stage1-brief"]
    assert steps["stage2-raw"] == steps["stage1-brief"] + steps["stage2-brief"], "as long as both stages"
    features = {name for name, words in of.items() if "features=10.0" in words}
    assert features == {"stage1-brief", "stage1-random"}, "the paper's, as the scores that are known were reached"


@pytest.mark.parametrize(("model", "rate"), [("demo-flux", "learning_rate=0.0015"), ("demo-wan", "router_rate=1e-06")])
def test_stage_two_learns_at_rates_of_its_model(tmp_path, model, rate):
    of = {stage.name: stage.command for stage in stages(_study(tmp_path, model))}
    told = {name: [word for word in words if "_rate=" in word] for name, words in of.items() if "dit-train" in words}
    routed = {"stage2", "stage2-brief", "stage2-time", "stage2-raw"}
    assert told == {name: [rate] * (name in routed) for name in told} and routed <= set(told)


@pytest.mark.parametrize("model", ["demo-flux", "demo-wan"])
def test_the_mean_of_the_blocks_is_the_papers_and_the_shift_the_samplers(model):
    from dit_jax.methods.routing import Routing
    from infer import load_pipeline
    from infer.request import Request

    told = sampled(model, 40)
    (least, most), shift = told["blocks"], told["shift"]
    pipe = load_pipeline(model)
    timesteps = pipe.schedule(pipe.prepare(Request(prompt="a red 7", steps=40, solver="euler"))).timesteps
    blocks = {"demo-flux": 12, "demo-wan": 10}[model]
    assert shift == {"demo-flux": 2.0, "demo-wan": 3.0}[model]
    share = Routing(least=least, most=most).mean_share(timesteps, blocks)
    assert abs(share - SHARE) < 0.02 and 2 <= most - least <= 5


def _writes(name, tmp_path, after=(), needs=(), code=0):
    file = tmp_path / name
    check = "".join(f"assert pathlib.Path({str(tmp_path / other)!r}).exists(); " for other in needs)
    act = f"sys.exit({code})" if code else f"pathlib.Path({str(file)!r}).open('a').write('x')"
    text = f"import pathlib, sys; {check}{act}"
    return Stage(name=name, makes=file, command=("python", "-c", text), after=after)


def test_parts_run_once_and_in_order(tmp_path):
    parts = [
        _writes("c", tmp_path, after=("a", "b"), needs=("a", "b")),
        _writes("b", tmp_path, after=("a",), needs=("a",)),
        _writes("a", tmp_path),
    ]
    for _ in range(2):
        assert run_all(parts, 2, tmp_path / "logs") is None
    assert [(tmp_path / name).read_text() for name in "abc"] == ["x"] * 3


def test_a_part_that_fails_is_named_and_what_waits_for_it_is_not_run(tmp_path):
    parts = [_writes("a", tmp_path, code=3), _writes("b", tmp_path, after=("a",))]
    assert run_all(parts, 2, tmp_path / "logs").startswith("a ended with 3, expected 0")
    assert not (tmp_path / "b").exists()
    assert (tmp_path / "logs" / "a.log").read_text().startswith("python -c")


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_stops_the_parts_that_run(tmp_path, stop):
    pid = tmp_path / "pid"
    part = f"import os, pathlib, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(60)"
    study = f"""
from pathlib import Path
from train.stages import Stage, run_all
parts = [
    Stage(name="a", makes=Path("a"), command=("python", "-c", {part!r})),
    Stage(name="b", makes=Path("b"), command=("python", "-c", "pass"), after=("a",)),
]
run_all(parts, 1, Path({str(tmp_path / "logs")!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", study], cwd=Path(__file__).parents[2])
    while not (pid.exists() and pid.read_text()):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(stop)
    assert process.wait(20) == 128 + stop
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_only_brings_what_is_needed(tmp_path):
    names = [stage.name for stage in chosen(stages(_study(tmp_path)), "stage1")]
    assert names == ["media", "data", "pruned", "stage1"]
    with pytest.raises(UserError, match="--only names 'stage9'"):
        chosen(stages(_study(tmp_path)), "stage9")


def test_nothing_is_made_for_the_sake_of_what_is_there(tmp_path):
    study = _study(tmp_path)
    study.path("stage1").mkdir(parents=True)
    names = [stage.name for stage in chosen(stages(study), "stage1,stage2")]
    assert names == ["media", "data", "stage2"]
    without = {stage.name for stage in stages(study)} - {stage.name for stage in chosen(stages(study), None)}
    assert without == {"stage1"}, "random width and the rest still need all that comes before"
    study.report("stage1").parent.mkdir()
    for stage in stages(study):
        if stage.name.endswith("-scores"):
            stage.makes.touch()
    assert not chosen(stages(study), None)


def _scores(study, name, right, steps=10):
    outcomes = {score: "".join(map(str, right)) for score in SCORES[study.model]}
    told = {"suite": "digits", "samples": 8, "seeds": 1, "model": name, "settings": {"seed": 0, "steps": steps}}
    shares = dict.fromkeys(outcomes, float(np.mean(right)))
    changes = {score: {"mean": -0.25, "low": -0.5, "high": 0.0} for score in outcomes}
    rest = {"frechet": 9.0, "margins": {}, "ceiling": {"digit": 1.0}, "outcomes": outcomes}
    write_report(study.report(name), {**told, **shares, **rest, "against": {"differences": changes}})


def _timed(study):
    few = {name: "dense:4" in entry for name, entry in entries(study).items()}
    rows = [
        {"plan": entry, "seconds": 2.0, "steps": 10, "measured_speedup": 1.0}
        | ({"seconds": 0.2, "steps": 4, "measured_speedup": 10.0} if few[name] else {})
        for name, entry in entries(study).items()
    ]
    study.path("bench.json").write_text(json.dumps(rows))


def _scored(study, *names):
    study.report("x").parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        _scores(study, name, [0] * 8 if name == "stage1-random" else [1, 1, 1, 0] * 2)


def test_the_table_has_every_student_and_judges_ablations_in_pairs(tmp_path):
    study = _study(tmp_path)
    _scored(study, *ROWS, *{side for pair in ABLATIONS.values() for side in pair} - {"stage1-unprotected"})
    _timed(study)
    found = report(study)
    assert found["students"]["four-steps"]["step_time"] == pytest.approx(0.25)
    lines = table(found).splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[2 : 2 + len(ROWS)]] == list(ROWS)
    random = next(line for line in lines if line.startswith("| scored above random width"))
    assert "75.0 | 0.0 | +75.0" in random and random.endswith("as in the paper |")
    third = next(line for line in lines if line.startswith("| third above first"))
    assert third.endswith("not distinguishable |") and not any("protected" in line for line in lines)


def test_the_table_has_what_there_is_so_far(tmp_path):
    study = _study(tmp_path)
    with pytest.raises(UserError, match="make teacher-scores first"):
        report(study)
    _scored(study, "teacher", "stage1", "ddit-bare")
    found = report(study)
    assert list(found["students"]) == ["teacher", "stage1"] and not found["ablations"]
    assert "| stage1 |  |  |  | 75.0 |" in table(found)


def test_what_is_known_of_a_study_is_not_done_again(tmp_path):
    first, again = _study(tmp_path / "first"), _study(tmp_path / "again")
    _scored(first, "teacher", "stage1", "stage1-random")
    _timed(first)
    file = tmp_path / "miniature.json"
    file.write_text(json.dumps(report(first)))
    restore(again, file)
    assert table(report(again)) == table(report(first)) and report(again)["reports"] == report(first)["reports"]
    _scores(again, "stage1", [0] * 8)
    restore(again, file)
    assert report(again)["students"]["stage1"]["digit"] == 0, "its own stay"
    names = {stage.name for stage in chosen([*stages(again), bench_stage(again)], None)}
    assert "coredit-scores" in names and not names & {"teacher-scores", "stage1-scores", "pruned-random", "bench"}


@pytest.mark.parametrize(
    ("text", "settings", "error"),
    [(None, {"seed": 4}, "has seed 3, found 4 here"), ("[]", {}, "is no file of train.miniature")],
)
def test_what_is_known_of_another_study_is_refused(tmp_path, text, settings, error):
    first = _study(tmp_path / "first")
    _scored(first, "teacher")
    file = tmp_path / "miniature.json"
    file.write_text(text or json.dumps(report(first)))
    with pytest.raises(UserError, match=error):
        restore(_study(tmp_path / "again", **settings), file)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(("words", "named"), [(["--only", "nothing"], "--only names 'nothing'")])
def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path, capsys, words, named):
    assert miniature.main(["--model", "demo-flux", "--out", str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err.strip()
    assert named in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
