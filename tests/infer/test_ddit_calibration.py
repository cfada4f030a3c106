"""`dit-calibrate ddit`: the τ that it finds, in runs with it, on a tiny model with adapters."""

import json

import numpy as np
import pytest

from dit_jax.config import UserError
from dit_jax.methods.ddit import token_counts
from infer import calibrate, load_pipeline
from infer.adapt import main as adapt
from infer.ddit_calibration import next_threshold
from infer.media import open_image
from infer.request import Request

SIZE, STEPS = (96, 80), 12
SMALL = ["--size", "96x80", "--frames", "5"]
PROMPTS = ["a red cat runs", "the dog sleeps", "a fish"]


@pytest.fixture(scope="module")
def adapted(text_to_video, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapted") / "model"
    assert adapt(["--model", str(text_to_video[0]), "--add", "ddit", "--out", str(folder)]) == 0
    (folder / "generation_defaults.json").write_text(json.dumps({"steps": STEPS}))
    return folder


@pytest.fixture
def run(adapted, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    shared = ["ddit", "--model", str(adapted), "--prompts", str(tmp_path / "prompts.txt"), *SMALL]
    return lambda *arguments: calibrate.main([*shared, *arguments])


def share_of_tokens(pipe, plan, seed, solver=None):
    """(mean share of the base size's tokens in runs of all prompts, the sizes of all steps)."""
    sizes = []
    for index, prompt in enumerate(PROMPTS):
        job = pipe.prepare(Request(prompt=prompt, size=SIZE, frames=5, plan=plan, solver=solver, seed=seed + index))
        assert job.steps == STEPS and job.solver == (solver or "unipc")
        pipe.denoise(job, chosen=lambda step, size, values: sizes.append(size))
    assert len(sizes) == STEPS * len(PROMPTS)
    tokens = dict(zip((1, 2, 4), token_counts((1, 2, 10, 12, 4), (1, 2, 2)), strict=True))
    return np.mean([tokens[size] for size in sizes]) / tokens[1], set(sizes)


def test_runs_with_the_plan_have_the_tokens_that_were_asked_for(adapted, run, tmp_path, capsys):
    pipe = load_pipeline(adapted)
    # The first two of which the first proposal does not reach.
    for wanted, solver, order, sizes in (
        (0.6, "unipc", 3, "2p/4p"),
        (0.8, "euler", 2, "2p/4p"),
        (0.6, "euler", 3, "2p"),
    ):
        out = tmp_path / f"{wanted}.json"
        words = ["--tokens", str(wanted), "--rho", "0.5", "--solver", solver, "--seed", "3", "--out", str(out)]
        words += ["--order", str(order), "--sizes", sizes]
        assert run(*words, "--json") == 0
        report = json.loads(capsys.readouterr().out.splitlines()[-1])
        found, used = share_of_tokens(pipe, f"ddit:{out}", 3, solver)
        assert max(used) == (4 if "4p" in sizes else 2)
        assert abs(found - wanted) < 0.05
        assert found == pytest.approx(report["reached"], abs=1e-9)
        held = json.loads(out.read_text())
        assert held["tau"] == report["tau"] > 0 and (held["rho"], held["steps"]) == (0.5, STEPS)
        assert held["sizes"] == sizes
        tau = f"ddit:tau={held['tau']}:rho=0.5:order={order}:sizes={sizes}"
        assert share_of_tokens(pipe, tau, 3, solver) == (found, used)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.6.json", "0.8.json", "prompts.txt"]
    with pytest.warns(UserWarning, match="works with the euler solver: it takes the place of unipc"):
        assert pipe.prepare(Request(prompt="a fish", plan=f"ddit:{out}", size=SIZE, frames=5)).solver == "euler"
    with pytest.raises(UserError, match="is for 12 steps, found 20"):
        pipe.prepare(Request(prompt="a fish", plan=f"ddit:{out}", steps=20, size=SIZE, frames=5))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--tokens", "0.2"], "--tokens is 0.2: expected at least 0.3"),
        (["--tokens", "1"], "--tokens is 1: expected at least 0.3"),
        (["--tokens", "nan"], "--tokens is nan"),
        (["--tokens", "0.5", "--rho", "1.5"], "--rho is 1.5"),
        (["--tokens", "0.5", "--prompts", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(run, tmp_path, capsys, arguments, told):
    out = tmp_path / "ddit.json"
    assert run("--out", str(out), *arguments) == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert printed.startswith("dit-calibrate: ") and told in printed
    assert not out.exists()


def test_a_model_that_animates_an_image(image_to_video, pictures, tmp_path, capsys):
    folder, prompts, out = tmp_path / "adapted", tmp_path / "prompts.txt", tmp_path / "ddit.json"
    assert adapt(["--model", str(image_to_video[0]), "--add", "ddit", "--out", str(folder)]) == 0
    prompts.write_text("\n".join(PROMPTS))
    command = ["ddit", "--model", str(folder), "--prompts", str(prompts), "--out", str(out), *SMALL]
    command += ["--tokens", "0.7", "--steps", "9"]

    def found(*images):
        assert calibrate.main([*command, "--image", *images]) == 0
        return json.loads(out.read_text())

    same, each = found(pictures[0]), found(*pictures)
    assert same["tau"] != each["tau"]
    pipe, sizes = load_pipeline(folder), []
    images = [open_image(file) for file in pictures]
    for index, prompt in enumerate(PROMPTS):
        request = Request(prompt=prompt, image=images[index], size=SIZE, frames=5, seed=index, plan=f"ddit:{out}")
        pipe.denoise(pipe.prepare(request), chosen=lambda step, size, values: sizes.append(size))
    tokens = dict(zip((1, 2, 4), token_counts((1, 2, 10, 12, 4), (1, 2, 2)), strict=True))
    assert np.mean([tokens[size] for size in sizes]) / tokens[1] == pytest.approx(each["reached"], abs=1e-9)
    capsys.readouterr()
    assert calibrate.main(command) == 2
    assert "pass one as image (--image FILE" in capsys.readouterr().err


def test_a_model_without_adapters_is_refused(text_to_video, run, tmp_path, capsys):
    assert run("--tokens", "0.5", "--out", str(tmp_path / "x.json"), "--model", str(text_to_video[0])) == 2
    assert "dit-adapt --add ddit" in capsys.readouterr().err


def test_a_proposal_outside_the_bracket_is_replaced():
    assert next_threshold({0.0: 1.0}, 0.5, 3.0) == 3
    assert next_threshold({0.0: 1.0, 3.0: 0.4}, 0.5, 2.0) == 2
    assert next_threshold({0.0: 1.0, 3.0: 0.4}, 0.5, 4.0) == 1.5
    assert next_threshold({0.0: 1.0, 4.0: 0.4, 1.0: 0.8}, 0.5, 0.7) == 2
    assert next_threshold({0.0: 1.0, 1.0: 0.8}, 0.5, 0.7) == 2
