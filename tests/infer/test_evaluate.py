"""`dit-eval`: what it prints, what it asks of the model, and how it refuses. The model here draws real clips itself."""

import json
from dataclasses import replace

import pytest
from drawer import Drawer

from infer import digit_reader, evaluate
from infer.picture_scores import real_pictures
from infer.request import Defaults
from infer.suites import SUITES

FOUR = {"digit", "colour", "direction", "frechet"}


pytestmark = pytest.mark.usefixtures("quick_reader")


def _run(monkeypatch, capsys, pipe, *arguments):
    monkeypatch.setattr(evaluate, "_load", lambda model: pipe)
    assert evaluate.main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_report_of_a_model(monkeypatch, capsys, tmp_path):
    pipe = Drawer()
    arguments = [
        "--model",
        "demo-wan",
        "--suite",
        "moving-digits",
        "--samples",
        "6",
        "--guidance",
        "2.5",
        "--seed",
        "30",
    ]
    report = _run(monkeypatch, capsys, pipe, *arguments, "--sheets", str(tmp_path))
    assert report.keys() >= FOUR and report["ceiling"].keys() >= FOUR
    assert report["colour"] == report["direction"] == report["ceiling"]["colour"] == 1
    assert report["videos"] == 6 and report["model"] == "demo-wan" and report["suite"] == "moving-digits"
    settings = {"size": [128, 128], "frames": 17, "steps": 12, "guidance": 2.5, "true_cfg": 1.0}
    settings |= {"solver": "unipc", "seed": 30, "plan": "dense"}
    assert report["settings"] == settings
    # On a CPU one by one; every prompt has a seed of its own.
    assert [settings["seed"] for _, settings in pipe.calls] == [30, 31, 32, 33, 34, 35]
    prompts = [prompt for prompts, _ in pipe.calls for prompt in prompts]
    assert prompts == SUITES["moving-digits"].prompts(6)[1] == SUITES["moving-digits"].prompts(200)[1][:6]
    assert len(list(tmp_path.glob("*.png"))) == 6


def test_margins_are_of_every_score(monkeypatch, capsys):
    report = _run(monkeypatch, capsys, Drawer(), "--samples", "6")
    assert report["margins"].keys() == report["ceiling"].keys() - {"videos"}
    assert report["margins"]["colour"] == 0 < report["margins"]["frechet"]


def test_batches_elsewhere_are_filled_up(monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "_batch", lambda: 4)
    pipe = Drawer()
    _run(monkeypatch, capsys, pipe, "--samples", "6", "--seed", "30")
    assert [len(prompts) for prompts, _ in pipe.calls] == [4, 4]
    assert [settings["seed"] for _, settings in pipe.calls] == [30, 34]


def test_every_prompt_has_a_seed_of_its_own_for_each_of_the_seeds(monkeypatch, capsys):
    pipe = Drawer()
    report = _run(monkeypatch, capsys, pipe, "--samples", "2", "--seeds", "3", "--seed", "7")
    assert report["videos"] == 6 and report["seeds"] == 3
    asked = [(prompts[0], settings["seed"]) for prompts, settings in pipe.calls]
    prompts = SUITES["moving-digits"].prompts(2)[1]
    assert asked == list(zip(prompts * 3, range(7, 13), strict=True))


def test_kept_samples_are_not_made_again(monkeypatch, capsys, tmp_path):
    words = ("--samples", "3", "--keep", str(tmp_path))
    first, again, other = Drawer(), Drawer(), Drawer()
    report = _run(monkeypatch, capsys, first, *words)
    next(tmp_path.rglob("00001.npy")).unlink()  # as if stopped there
    assert _run(monkeypatch, capsys, again, *words) == report
    assert len(first.calls) == 3 and [settings["seed"] for _, settings in again.calls] == [1]
    _run(monkeypatch, capsys, other, *words, "--steps", "5")
    assert len(other.calls) == 3, "samples of other settings are others"
    assert not list(tmp_path.rglob("*.partial"))


def test_more_samples_of_one_seed_begin_with_those_that_are_there(monkeypatch, capsys, tmp_path):
    words = ("--keep", str(tmp_path))
    fewer, more, seeds = Drawer(), Drawer(), Drawer()
    _run(monkeypatch, capsys, fewer, "--samples", "3", *words)
    report = _run(monkeypatch, capsys, more, "--samples", "5", *words)
    assert report == _run(monkeypatch, capsys, Drawer(), "--samples", "5")
    assert [settings["seed"] for _, settings in more.calls] == [3, 4]
    _run(monkeypatch, capsys, seeds, "--samples", "3", "--seeds", "2", *words)
    assert len(seeds.calls) == 6, "the second seed of the first prompt is another sample than the fourth prompt"


def test_shift_and_the_guidance_of_two_experts_reach_every_generation(monkeypatch, capsys):
    pipe = Drawer()
    pipe.defaults = replace(Drawer.defaults, guidance=(3.0, 4.0))
    report = _run(monkeypatch, capsys, pipe, "--samples", "2", "--shift", "7", "--guidance", "3.5,2")
    assert report["settings"]["shift"] == 7 and report["settings"]["guidance"] == [3.5, 2]
    assert [(settings["shift"], settings["guidance"]) for _, settings in pipe.calls] == [(7, (3.5, 2))] * 2


def test_a_plan_reaches_every_generation(monkeypatch, capsys):
    pipe = Drawer()
    report = _run(monkeypatch, capsys, pipe, "--videos", "2", "--plan", "hsa:25")
    assert report["settings"]["plan"] == "hsa:25" and report["settings"]["steps"] == 20
    assert [settings["plan"] for _, settings in pipe.calls] == ["hsa:25"] * 2
    assert evaluate.main(["--plan", "hsa:26"]) == 2


def test_models_are_compared_in_pairs(monkeypatch, capsys, tmp_path):
    teacher, student = str(tmp_path / "teacher.json"), str(tmp_path / "student.json")
    good = _run(monkeypatch, capsys, Drawer(), "--samples", "6", "--report", teacher)
    assert "outcomes" not in good and json.loads((tmp_path / "teacher.json").read_text()).items() >= good.items()
    other = Drawer(lambda clip: clip[..., [1, 2, 0]])
    words = ("--samples", "6", "--steps", "4", "--report", student, "--against", teacher)
    report = _run(monkeypatch, capsys, other, *words)
    against = report["against"]
    assert against["model"] == "demo-wan" and against["settings"]["steps"] == 12
    found = against["differences"]
    assert found["colour"]["mean"] == pytest.approx(report["colour"] - good["colour"]) and found["colour"]["high"] < 0
    assert json.loads((tmp_path / "student.json").read_text())["against"] == against

    assert evaluate.main([*words[:2], "--against", teacher]) == 0
    expected = ["colour", f"{found['colour']['mean']:+.3f}"]
    assert any(line.split()[:2] == expected for line in capsys.readouterr().out.splitlines())
    assert evaluate.main(["--samples", "5", "--against", teacher]) == 2
    assert "has samples 6, found 5" in capsys.readouterr().err


def test_faulty_model_scores_below_the_ceiling(monkeypatch, capsys):
    report = _run(monkeypatch, capsys, Drawer(lambda clip: clip[::-1, ..., [1, 2, 0]]), "--videos", "6")
    assert report["direction"] < 0.5 < report["ceiling"]["direction"]
    assert report["colour"] < 0.5 < report["ceiling"]["colour"]


class PictureDrawer(Drawer):
    """Stands in for a pipeline of pictures."""

    real = staticmethod(real_pictures)
    defaults = Defaults(steps=8, true_cfg=3.0, solver="euler", video=False, grammar="digits")


def test_pictures_have_a_suite_of_their_own(monkeypatch, capsys, tmp_path):
    drawer = PictureDrawer()
    report = _run(monkeypatch, capsys, drawer, "--samples", "5", "--sheets", str(tmp_path))
    assert report["suite"] == "digits" and report["colour"] == report["count"] == report["ceiling"]["colour"] == 1
    assert report["settings"]["true_cfg"] == 3 and report["settings"]["frames"] == 1
    assert len(list(tmp_path.glob("*.png"))) == 5
    upside_down = _run(monkeypatch, capsys, PictureDrawer(lambda picture: picture[::-1, ::-1]), "--samples", "12")
    assert upside_down["all"] < 0.5 and upside_down["colour"] < 0.8


def test_a_suite_of_videos_refuses_a_model_of_pictures(monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "_load", lambda model: PictureDrawer())
    assert evaluate.main(["--suite", "moving-digits"]) == 2
    assert "makes pictures: expected videos" in capsys.readouterr().err


def test_real_needs_no_model(monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "_load", lambda model: pytest.fail("a model was loaded"))
    assert evaluate.main(["--real", "--videos", "4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["ceiling"].keys() >= FOUR and "digit" not in report


def test_table_for_reading(monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "_load", lambda model: Drawer())
    assert evaluate.main(["--videos", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["colour", "1.000", "0.000", "1.000"] for line in lines)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--suite", "moving-cats"], "moving-cats"),
        (["--samples", "0"], "--samples is 0"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--keep", f"{__file__}/kept"], "kept"),
        (["--model", "no-such-model"], "no-such-model"),
        (["--against", "no-such-report.json"], "no-such-report.json"),
        (["--real", "--report", "report.json"], "--real"),
        (["--report", f"{__file__}/report.json"], "report.json"),
        (["--sheets", f"{__file__}/sheets"], "sheets"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, named, capsys):
    assert evaluate.main(arguments) == 2
    error = capsys.readouterr().err
    assert named in error and len(error.strip().splitlines()) == 1


def test_bad_solver_is_refused_before_anything_is_read(monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "_load", lambda model: Drawer())
    monkeypatch.setattr(digit_reader, "load_reader", lambda: pytest.fail("read"))
    assert evaluate.main(["--solver", "magic"]) == 2
    assert "magic" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--nonsense"], ["--videos", "many"]])
def test_bad_flags_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(arguments)
    assert stop.value.code == 2


def test_every_prompt_needs_a_seed(monkeypatch, capsys):
    asked = []

    class Refusing(Drawer):
        def prepare(self, request):
            asked.append(request.prompt)
            return super().prepare(request)

    monkeypatch.setattr(evaluate, "_load", lambda model: Refusing())
    assert evaluate.main(["--videos", "6", "--seeds", "2", "--solver", "magic"]) == 2
    assert len(asked[0]) == 12


def test_a_failing_disk_is_one_sentence(monkeypatch, capsys):
    def full(model):
        raise OSError(28, "No space left on device", "weights")

    monkeypatch.setattr(evaluate, "_load", full)
    assert evaluate.main([]) == 2
    assert capsys.readouterr().err == "dit-eval: weights: No space left on device.\n"
