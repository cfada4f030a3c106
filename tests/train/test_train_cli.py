"""`dit-train`: options from a recipe's dataclass, and bad input told in a sentence with exit code 2."""

import dataclasses
import re
import sys

import pytest

from train import cli

RECIPE = '''"""A recipe for a test.

    dit-train here.py
"""
from dataclasses import dataclass
from pathlib import Path

@dataclass(frozen=True, kw_only=True)
class Shared:
    """What all have.

    out  where it goes
    """

    out: str = "x"

@dataclass(frozen=True, kw_only=True)
class Config(Shared):
    steps: int = 3
    rate: float = 0.5
    quick: bool = False
    limit: int | None = None

def run(config):
    Path(config.out).write_text(repr(config))
'''


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "here.py"
    path.write_text(RECIPE)
    return str(path)


def test_settings_reach_the_recipe(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "keep_programs", lambda: None)
    out = tmp_path / "out"
    settings = [f"out={out}", "steps=7", "rate=2", "quick=True", "limit=5"]
    arguments = [part for setting in settings for part in ("--set", setting)]
    assert cli.main([recipe, *arguments]) == 0
    assert out.read_text() == f"Config(out='{out}', steps=7, rate=2.0, quick=True, limit=5)"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["setps=3"], "There is no option 'setps'; did you mean 'steps'?"),
        (["steps=many"], "The option steps takes int, found 'many'."),
        (["steps=1.5"], "The option steps takes int, found '1.5'."),
        (["steps=True"], "The option steps takes int, found 'True'."),
        (["quick=1"], "The option quick takes bool, found '1'."),
        (["limit=x"], "The option limit takes int or NoneType, found 'x'."),
        (["steps"], "--set takes name=value, found 'steps'."),
    ],
)
def test_bad_settings_are_told(recipe, settings, sentence, capsys):
    assert cli.main([recipe, "--set", *settings]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_help_lists_every_option(recipe, capsys):
    assert cli.main([recipe, "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("A recipe for a test.")
    for name in ("out", "steps", "rate", "quick", "limit"):
        assert f"\n  {name} " in shown
    assert "What all have.\n\nout  where it goes\n" in shown and "Config(" not in shown


@pytest.mark.parametrize("missing", ["grain", "array_record.python.array_record_module"])
def test_without_what_reads_data_the_extra_is_named(missing, monkeypatch, capsys):
    for module in ("train.data_libraries", "train.loader", "train.recipe", "train.shards"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    assert cli.main(["finetune", "--help"]) == 2
    assert f"training data need {missing}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["demo_vae", "demo_text", "demo_wan"])
def test_every_shipped_recipe_describes_itself(name, capsys):
    assert cli.main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"dit-train {name}" in shown and "Score:" in shown and "CPU cores" in shown
    for option in ("out", "steps", "seed", "save_every", "learning_rate"):
        assert f"\n  {option} " in shown


ENDED = '''"""A recipe that stops after `reached` steps, or fails as a full disk does.

    dit-train ended.py
"""
from dataclasses import dataclass
from train.loop import Outcome, RunConfig

@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    reached: int = 0

def run(config):
    if not config.reached:
        with open("/dev/full", "w") as full:
            full.write("x")
    return Outcome(None, config.reached, config.reached < config.steps)
'''


RECIPES = ("finetune", "pare_stage1", "pare_stage2", "step_distill", "coredit", "ddit")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_of_distillation_lists_its_options_and_its_score(name, capsys):
    assert cli.main([name, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"dit-train {name}" in shown and re.search(r"Reached on demo-flux .*\d+\.\d %", shown)
    recipe = cli.load_recipe(name)
    demo = recipe.VARIANTS["demo"]
    for field in dataclasses.fields(recipe.Config):
        assert f" {field.name} " in shown
        assert field.name not in demo or f", demo {demo[field.name]!r}" in shown


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        (["reached=5"], 0),
        (["reached=3"], 0),
        (["reached=3", "stopped_code=75"], 75),
        (["reached=5", "stopped_code=75"], 0),
    ],
)
def test_a_run_that_was_stopped_ends_as_asked(tmp_path, monkeypatch, settings, code):
    monkeypatch.setattr(cli, "keep_programs", lambda: None)
    path = tmp_path / "ended.py"
    path.write_text(ENDED)
    words = [word for setting in ("steps=5", f"out={tmp_path}/run", *settings) for word in ("--set", setting)]
    assert cli.main([str(path), *words]) == code


def test_a_disk_that_is_full_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "keep_programs", lambda: None)
    path = tmp_path / "ended.py"
    path.write_text(ENDED)
    assert cli.main([str(path), "--set", f"out={tmp_path}/run"]) == 2
    told = capsys.readouterr().err
    assert f"dit-train: {tmp_path}/run could not be written (No space left on device)" in told and "make room" in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("code", [-1, 2, 256])
def test_a_code_that_means_something_else_is_refused(tmp_path, capsys, code):
    path = tmp_path / "ended.py"
    path.write_text(ENDED)
    assert cli.main([str(path), "--set", f"stopped_code={code}"]) == 2
    assert f"stopped_code is {code}: expected 0, or 4 to 255" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["demo_wam"], "did you mean demo_wan?"),
        (["nowhere.py"], "There is no recipe 'nowhere.py'"),
        ([], "No recipe is named"),
        (["demo_vae", "--steps", "3"], "Unknown argument '--steps'"),
    ],
)
def test_bad_recipes_and_arguments_are_told(arguments, sentence, capsys):
    assert cli.main(arguments) == 2
    assert sentence in capsys.readouterr().err


def test_a_file_that_is_no_recipe_is_told(tmp_path, capsys):
    path = tmp_path / "empty.py"
    path.write_text("x = 1\n")
    assert cli.main([str(path)]) == 2
    assert "is no recipe" in capsys.readouterr().err


# The papers' own, where they say (arXiv 2605.27336, 2605.14191, 2602.16968, 2506.08009).
AT_FULL_SCALE = {
    "pare_stage1": {"steps": 7000, "batch": 4, "dtype": "bfloat16", "learning_rate": 3e-5, "warmup": 100},
    "pare_stage2": {"steps": 7000, "batch": 4, "learning_rate": 3e-5, "router_rate": 5e-4, "warmup": 100},
    "step_distill": {"learning_rate": 2e-6, "fake_rate": 4e-7, "fake_turns": 5, "shift": 5.0, "ema_decay": 0.99},
    "coredit": {"learning_rate": 1e-5, "ratio": 0.45, "attention": 0.5},
    "ddit": {"rank": 32},
}


@pytest.mark.parametrize("name", AT_FULL_SCALE)
def test_without_a_variant_a_recipe_has_its_papers_numbers(name):
    config = dataclasses.asdict(cli.load_recipe(name).Config())
    expected = AT_FULL_SCALE[name]
    assert {option: config[option] for option in expected} == expected and config["variant"] == "full"
