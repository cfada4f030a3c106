"""Reports with every sample's outcomes: written, read, refused, and compared in pairs."""

from types import SimpleNamespace

import numpy as np
import pytest

from dit_jax.config import UserError
from infer.paired_scores import OUTCOMES, check_alike, differences, outcomes, read_report, write_report


def _report(seeds=1, seed=0, **told):
    prompts = len(next(iter(told.values()))) // seeds
    head = {"suite": "digits", "samples": prompts, "seeds": seeds, "model": "some", "settings": {"seed": seed}}
    return {**head, OUTCOMES: told}


def _drawn(seed, count):
    return "".join(np.random.default_rng(seed).choice(["0", "1"], count))


def test_outcomes_are_a_letter_a_sample():
    readings = [
        SimpleNamespace(outcomes={"digit": True, "relation": None}),
        SimpleNamespace(outcomes={"digit": False, "relation": True}),
    ]
    assert outcomes(readings) == {"digit": "10", "relation": "-1"}


def test_a_report_is_read_as_it_was_written(tmp_path):
    report = _report(digit="101", relation="-10")
    write_report(tmp_path / "report.json", report)
    assert read_report(tmp_path / "report.json") == report
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize("text", ["no json", "[1]", '{"digit": 0.5}'])
def test_another_file_is_refused(tmp_path, text):
    file = tmp_path / "other.json"
    file.write_text(text)
    with pytest.raises(UserError, match="no report of `dit-eval`"):
        read_report(file)


def test_pairs_are_closer_than_their_shares():
    """Two models that differ in 6 of 200 prompts: unpaired margins of 0.5 ± 0.07 would hide it."""
    ours = _drawn(0, 200)
    change = differences(_report(digit=ours), _report(digit=ours.replace("1", "0", 6)))["digit"]
    assert change["mean"] == pytest.approx(0.03)
    assert 0 < change["low"] < 0.03 < change["high"] < 0.06


def test_prompts_are_drawn_with_all_their_seeds():
    """Four seeds that always agree say no more than one."""
    sides = _drawn(1, 50), _drawn(2, 50)
    once = differences(*(_report(digit=side) for side in sides))
    often = differences(*(_report(seeds=4, digit=side * 4) for side in sides))
    assert once == often


def test_prompts_without_a_say_are_left_out():
    found = differences(
        _report(relation="-11-", count="1111", all="----"),
        _report(relation="-00-", count="1111", all="----"),
    )
    assert found["relation"] == {"mean": 1, "low": 1, "high": 1} and found["count"]["mean"] == 0
    assert "all" not in found


@pytest.mark.parametrize(
    ("other", "named"),
    [(_report(digit="10"), "samples 2"), (_report(digit="101", seed=7), "seed 7")],
)
def test_other_prompts_or_seeds_are_refused(other, named, tmp_path):
    with pytest.raises(UserError, match=named):
        check_alike(_report(digit="101"), other, tmp_path / "other.json")
    check_alike(_report(digit="101"), _report(digit="000"), tmp_path / "other.json")
