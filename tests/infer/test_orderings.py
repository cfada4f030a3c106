"""The papers' orderings on tiny models with random weights: what is compared, what is told, what is refused."""

import json

import numpy as np
import pytest
from tiny_flux import pipeline as flux_pipeline

from dit_jax.methods.plan import parse_plan
from infer import load_pipeline, ordering_studies, orderings
from infer.ordering_studies import Ordering, Study, coredit_study, errors_of, joined, judged, pare_study
from infer.request import Request
from infer.teacher_forced import trajectories

PROMPTS = ["a red cat runs", "the dog sleeps", "a fish on the moon"]
SMALL = dict(size=(64, 48), frames=5, steps=2)
FEW = ["--size", "64x48", "--frames", "5", "--steps", "2", "--levels", "2", "--samples", "2", "--calibration", "1"]


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    return str(file)


def test_settings_of_coredit_are_what_their_names_say(text_to_video):
    pipe = load_pipeline(text_to_video[0])
    job = pipe.prepare(Request(prompt=PROMPTS[0], **SMALL))
    study, branches = coredit_study(pipe, [job])
    [plain] = trajectories(pipe, [job])
    assert branches == 2 and len(study.orderings) == 10
    for name, arm in study.arms.items():
        made = arm(plain, 5)
        if name.endswith(", calibrated"):
            skipped = np.asarray(made.call.attention.skipped)[made.steering[0].table]
            uniform = study.arms[name.removesuffix(", calibrated")](plain, 5)
            assert (
                skipped.mean() == pytest.approx(max(uniform.call.attention.skipped), abs=1) and len(set(skipped[0])) > 1
            )
            continue
        [coredit] = parse_plan(name).methods
        assert made.call == coredit.applied(plain.denoiser, plain.run).call
        assert len({level for level in made.call.attention.skipped if level}) == 1, "the last steps skip as many"
        assert [int(steer.seed) for steer in made.steering[1:]] == [5] * (coredit.select == "random")


def test_settings_of_pare_are_as_narrow_as_one_another(text_to_video, tmp_path, monkeypatch):
    monkeypatch.setattr(ordering_studies, "SHARE", 0.5)
    pipe = load_pipeline(text_to_video[0])
    study = pare_study(pipe, PROMPTS[:1], **SMALL)
    [plain] = trajectories(pipe, [pipe.prepare(Request(prompt=PROMPTS[0], **SMALL))])
    made = {name: arm(plain, 5).model.config for name, arm in study.arms.items()}
    sizes = {name: (config.heads, config.mlp_width) for name, config in made.items()}
    assert set(sizes.values()) == {(1, 40), (2, 20)}
    for ordering in study.orderings:
        assert sizes[ordering.better] == sizes[ordering.worse]
    assert [ordering.name for ordering in study.orderings][-1] == "temporal heads protected above not"
    flux_pipeline(dev=True).save_pretrained(tmp_path / "flux")
    still = pare_study(load_pipeline(tmp_path / "flux"), PROMPTS[:1], size=(32, 32), steps=2)
    assert not any("temporal" in ordering.name for ordering in still.orderings)


def test_every_prompt_has_its_errors_at_every_level_and_lots_of_its_own():
    class Plain:
        def __init__(self, number):
            self.number = number

        def error(self, changed, level):
            return self.number + 10 * level + 100 * changed

    told = []
    errors = errors_of(
        {"one": lambda plain, seed: 0, "other": lambda plain, seed: seed},
        map(Plain, range(3)),
        (0, 4),
        7,
        lambda: told.append(1),
    )
    np.testing.assert_array_equal(errors["one"], [[0, 40], [1, 41], [2, 42]])
    np.testing.assert_array_equal(errors["other"], [[700, 740], [801, 841], [902, 942]])
    assert len(told) == 6


def test_an_ordering_is_judged_by_paired_differences():
    """The prompts differ by far more than the settings: only pairs tell them apart."""
    rng = np.random.default_rng(0)
    of_prompts = rng.uniform(0, 10, (12, 1))
    errors = {"a": of_prompts + np.array([0.0, 0.5]), "b": of_prompts + 0.1 + rng.uniform(0, 0.02, (12, 2))}
    row = judged(Ordering("a above b", "a", "b"), errors)
    assert row["found"] == "the other way round" and row["found_by_level"] == ["as in the paper", "the other way round"]
    mean, low, high = row["difference"]
    assert low < mean < high and mean == pytest.approx((errors["b"] - errors["a"]).mean(), abs=1e-5)
    assert row["worse_error"] - row["better_error"] == pytest.approx(mean, abs=2e-5)
    assert judged(Ordering("b above a", "b", "a", "as expected"), errors)["found"] == "as expected"


def test_studies_are_joined_in_order():
    one, other = (
        Study(
            orderings=(Ordering(name, name, "0"),),
            arms={name: lambda plain, seed: plain, "0": lambda plain, seed: seed},
        )
        for name in "ab"
    )
    both = joined([one, other])
    assert [ordering.name for ordering in both.orderings] == ["a", "b"] and list(both.arms) == ["a", "0", "b"]


@pytest.mark.long
def test_the_command_from_end_to_end(text_to_video, prompts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ordering_studies, "RATIOS", (0.4,))
    monkeypatch.setattr(ordering_studies, "SHARE", 0.5)
    out = tmp_path / "deep" / "found.json"
    command = ["--model", str(text_to_video[0]), "--prompts", prompts, "--json", str(out), *FEW]
    assert orderings.main(command) == 0
    report = json.loads(out.read_text())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(report["guided"]["orderings"]) + len(report["unguided"]["orderings"]) == 8 + 6
    assert report["guided"]["branches"] == 2 and report["unguided"]["branches"] == 1
    assert report["unguided"]["guidance"] == 1 and len(report["guided"]["sigmas"]) == 2
    for setting in ("guided", "unguided"):
        for row in report[setting]["orderings"]:
            errors = report[setting]["errors_by_level"]
            assert (
                row["better_error"] == pytest.approx(np.mean(errors[row["better"]]), abs=2e-5)
                and row["better_error"] > 0
            )
    assert [file.name for file in out.parent.iterdir()] == ["found.json"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--samples", "1"], "--samples is 1: expected at least 2"),
        (["--levels", "3"], "--steps is 2: expected at least 3"),
        (["--samples", "3"], "holds 3 prompts: expected 4"),
        (["--prompts", "nowhere.txt"], "cannot read the prompts"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(text_to_video, prompts, tmp_path, capsys, arguments, told):
    out = tmp_path / "found.json"
    command = ["--model", str(text_to_video[0]), "--prompts", prompts, "--json", str(out), *FEW, *arguments]
    assert orderings.main(command) == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert printed.startswith("infer.orderings: ") and told in printed and not out.exists()


def test_models_that_it_is_not_for_are_refused(text_to_video, text_experts, capsys):
    assert orderings.main(["--model", str(text_experts[0]), *FEW]) == 2
    assert "has two transformers: expected one" in capsys.readouterr().err
    assert orderings.main(["--model", str(text_to_video[0]), *FEW]) == 2
    assert "expected --prompts FILE" in capsys.readouterr().err
