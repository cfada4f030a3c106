"""What docs/distillation.md and the recipes say that was reached is what the study's files hold."""

import json
from pathlib import Path

import pytest

from train.cli import load_recipe

DOCS = Path(__file__).parents[2] / "docs"
MODELS = ("demo-flux", "demo-wan")
STUDENTS = {
    "finetune": ("finetune",),
    "pare_stage1": ("stage1",),
    "pare_stage2": ("stage2",),
    "step_distill": ("four-steps", "stage3"),
    "coredit": ("coredit",),
    "ddit": ("ddit",),
}


def study(model):
    return json.loads((DOCS / "benchmarks" / f"miniature-{model}.json").read_text())


def share(score):
    return f"{100 * score['digit']:.1f} %"


def points(difference):
    mean, low, high = (f"{100 * difference['digit'][name]:+.1f}".replace("-", "−") for name in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


@pytest.mark.parametrize("model", MODELS)
def test_every_score_is_a_row_of_the_page(model):
    lines = [line for line in (DOCS / "distillation.md").read_text().splitlines() if line.startswith("| ")]
    found = study(model)
    expected = {name: (share(row), points(row["against_teacher"])) for name, row in found["students"].items()
                if row["against_teacher"]}  # fmt: skip
    expected |= {
        name: (share(pair["better"]), share(pair["worse"]), points(pair["differences"]))
        for name, pair in found["ablations"].items()
    }
    assert len(expected) >= 5
    for name, figures in expected.items():
        assert any(all(f"| {figure} |" in line for figure in figures) for line in lines), (name, figures)


@pytest.mark.parametrize("recipe", STUDENTS)
def test_every_score_is_in_its_recipes_docstring(recipe):
    told = load_recipe(recipe).__doc__
    for model in MODELS:
        reports = study(model)["reports"]
        for name in STUDENTS[recipe]:
            score = reports.get(name) or reports.get(f"{name}-brief")
            assert score is None or f"{100 * score['digit']:.1f} " in told, (model, name)
