"""`dit-calibrate` from its arguments to a file that a plan reads, on a tiny model with random weights."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from dit_jax.methods.method import Run
from dit_jax.methods.plan import parse_plan
from infer import calibrate, load_pipeline
from infer.request import Request

SMALL = ["--size", "96x80", "--frames", "5", "--steps", "2"]


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a red cat runs\n\nthe dog sleeps\na fish\n")
    return file


def run(folder, prompts, out, *arguments):
    return calibrate.main(["coredit", "--model", str(folder), "--prompts", str(prompts), "--out", str(out), *arguments])


def test_ratios_of_a_model_are_a_plan_for_it(text_to_video, prompts, tmp_path, capsys):
    out = tmp_path / "deep" / "ratios.json"
    assert run(text_to_video[0], prompts, out, "--ratio", "0.4", *SMALL, "--json") == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    written = json.loads(out.read_text())
    assert report["tokens"] == 60 and report["prompts"] == 3 and report["seconds"] > 0
    assert written["ratios"] == report["ratios"]["transformer"] and written["stride"] == 3
    assert len(written["ratios"]) == 3 and max(written["ratios"]) <= 0.6
    assert np.mean(written["ratios"]) == pytest.approx(0.4, abs=1e-6) and report["mean"] == pytest.approx(0.4)
    assert [path.name for path in out.parent.iterdir()] == ["ratios.json"]
    assert parse_plan(f"coredit:{out}").methods[0].ratios == tuple(written["ratios"])

    pipe = load_pipeline(text_to_video[0])

    def latents(prompt, plan):
        request = Request(prompt=prompt, plan=plan, size=(96, 80), frames=5, steps=4, seed=3)
        return pipe.denoise(pipe.prepare(request))

    pruned = latents("a red cat runs", f"coredit:{out}")
    programs = len(pipe.programs)
    latents("the dog sleeps", f"coredit:{out}")
    assert len(pipe.programs) == programs
    assert np.abs(pruned - latents("a red cat runs", "dense")).max() > 1e-3


def test_a_batch_that_is_filled_up_counts_what_was_asked(text_to_video, prompts, monkeypatch):
    pipe = load_pipeline(text_to_video[0])
    told = ["coredit", "--model", "m", "--prompts", str(prompts), "--out", "o", "--ratio", "0.4", *SMALL]
    sums = []
    for batch in (3, 2):
        monkeypatch.setattr(calibrate, "BATCH", batch)
        watch = calibrate.CoherenceWatch(stride=3)
        calibrate.run_prompts(pipe, calibrate.request_of(calibrate.parser().parse_args(told)), watch, "")
        sums.append(watch.sums["transformer"])
    np.testing.assert_allclose(sums[0], sums[1], rtol=1e-4, atol=1e-4)
    assert sums[0].shape == (3, 60) and (np.diff(sums[0][:, :36]) <= 0).all()


def test_an_image_goes_with_its_prompt_in_every_batch(image_to_video, prompts, pictures, monkeypatch):
    pipe = load_pipeline(image_to_video[0])
    told = ["coredit", "--model", "m", "--prompts", str(prompts), "--out", "o", "--ratio", "0.4", *SMALL, "--image"]

    def coherence(batch, *images):
        monkeypatch.setattr(calibrate, "BATCH", batch)
        watch = calibrate.CoherenceWatch(stride=3)
        calibrate.run_prompts(pipe, calibrate.request_of(calibrate.parser().parse_args([*told, *images])), watch, "")
        return watch.sums["transformer"]

    first, second, third = pictures
    together = coherence(3, first, second, third)
    np.testing.assert_allclose(coherence(2, first, second, third), together, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(coherence(3, first), coherence(3, first, first, first), rtol=1e-6)
    for other in (coherence(3, first), coherence(3, second), coherence(3, second, first, third)):
        assert np.abs(other - together).max() > 1e-2


def test_a_model_that_animates_an_image(image_to_video, prompts, pictures, tmp_path, capsys):
    command = ["magcache", "--model", str(image_to_video[0]), "--prompts", str(prompts), *SMALL]
    found = []
    for image in pictures[:2]:
        assert calibrate.main([*command, "--image", image, "--out", str(tmp_path / "ratios.json")]) == 0
        found.append(json.loads((tmp_path / "ratios.json").read_text())["ratios"])
    assert found[0] != found[1]
    assert calibrate.main([*command, "--out", str(tmp_path / "none.json")]) == 2
    assert "this model animates an image and none was given: pass one as image (--image FILE" in capsys.readouterr().err
    assert not (tmp_path / "none.json").exists()


def test_a_model_that_draws_between_two_images(frames_to_video, prompts, pictures, tmp_path, capsys):
    command = ["magcache", "--model", str(frames_to_video), "--prompts", str(prompts), "--image", pictures[0], *SMALL]
    found = []
    for last in pictures[1:]:
        assert calibrate.main([*command, "--last-image", last, "--out", str(tmp_path / "ratios.json")]) == 0
        found.append(json.loads((tmp_path / "ratios.json").read_text())["ratios"])
    assert found[0] != found[1]
    assert calibrate.main([*command, "--out", str(tmp_path / "none.json")]) == 2
    assert "one was given: pass the other as last_image (--last-image FILE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--ratio", "0.7"], "--ratio is 0.7"),
        (["--ratio", "nan"], "--ratio is nan"),
        (["--ratio", "0.4", "--stride", "1"], "--stride is 1"),
        (["--ratio", "0.4", "--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--ratio", "0.4", "--size", "50x32"], "50x32"),
        (["--ratio", "0.4", "--model", "nowhere"], "nowhere"),
        (["--ratio", "0.4", "--model", "nowhere", "--image", "nowhere.png"], "cannot read the image 'nowhere.png'"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(text_to_video, prompts, tmp_path, capsys, arguments, told):
    out = tmp_path / "ratios.json"
    assert run(text_to_video[0], prompts, out, *SMALL, *arguments) == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert printed.startswith("dit-calibrate: ") and told in printed
    assert not out.exists()


def test_an_image_for_a_model_that_takes_none(text_to_video, prompts, pictures, tmp_path, capsys):
    out = tmp_path / "ratios.json"
    assert run(text_to_video[0], prompts, out, "--ratio", "0.4", *SMALL, "--image", pictures[0]) == 2
    assert "an image was given to a text-to-video model: leave it out" in capsys.readouterr().err


def test_magcaches_ratios_are_measured_and_used(text_to_video, prompts, tmp_path):
    out = tmp_path / "ratios.json"
    command = ["magcache", "--model", str(text_to_video[0]), "--prompts", str(prompts), "--out", str(out), *SMALL[:-1]]
    assert calibrate.main([*command, "4"]) == 0
    [plan] = parse_plan(f"magcache:0.5:ratios={out}").methods
    assert plan.steps == 4 and plan.ratios[0] == 1 and min(plan.ratios) > 0
    pipe = load_pipeline(text_to_video[0])
    planned = pipe("a fish", plan=f"magcache:0:ratios={out}", size=(96, 80), frames=5)
    np.testing.assert_array_equal(planned.latents, pipe("a fish", steps=4, size=(96, 80), frames=5).latents)


def test_both_experts_make_one_run_of_the_samples_that_count(monkeypatch):
    monkeypatch.setattr(calibrate, "recording", lambda denoiser, steps: denoiser)
    watch, norms = calibrate.ResidualWatch(), np.random.default_rng(0).random((2, 4, 6))
    watch.samples = 2  # of three, with two branches each
    for of_run in norms:
        for first, stop in ((0, 3), (3, 4)):
            run = Run(latents_shape=(3, 1, 1, 1, 1), first=first, stop=stop, steps=4, sigmas=None)
            watch.around(SimpleNamespace(branches=2), run)
            own = np.zeros((4, 6))
            own[first:stop] = of_run[first:stop]
            watch.finished("", SimpleNamespace(cache=own))
    np.testing.assert_array_equal(watch.runs, norms[:, :, :4])


def test_one_step_has_no_ratios(text_to_video, prompts, tmp_path, capsys):
    command = [
        "magcache",
        "--model",
        str(text_to_video[0]),
        "--prompts",
        str(prompts),
        "--out",
        str(tmp_path / "r.json"),
    ]
    assert calibrate.main([*command, "--steps", "1"]) == 2
    assert "expected at least 2" in capsys.readouterr().err
