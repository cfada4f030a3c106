"""What a server offers, as a file says it."""

import json

import pytest

from dit_jax.config import UserError
from dit_jax.methods.plan import Plan
from infer.buckets import PRESETS, Frame, Offer, read_buckets
from infer.request import Defaults, Request, fill

FILE = {
    "wan": {
        "shapes": ["832x480x81", "480x832x81", "832x480x49"],
        "plans": {
            "high": {"plan": "dense", "steps": 50},
            "standard": {"plan": "hsa:50", "steps": 40},
            "fast": {"plan": "dense", "steps": 20},
        },
        "batches": [4, 1],
    }
}


@pytest.fixture
def wan(tmp_path):
    (tmp_path / "buckets.json").write_text(json.dumps(FILE))
    return read_buckets(str(tmp_path / "buckets.json"), ["models/wan"])["models/wan"]


def test_a_file_says_what_is_served(wan):
    assert wan.shapes[0] == Frame(832, 480, 81) and wan.batches == (1, 4)
    assert [wan.batch(samples) for samples in (1, 2, 4)] == [1, 4, 4]
    assert wan.offer(None, None, None) == wan.offer("high", None, None) == Offer(plan=Plan(), steps=50)
    assert wan.offer("auto", None, 50).steps == 50
    assert wan.offer(None, "dense", 20) == wan.offer("fast", None, None)
    assert wan.offer(None, "hsa:50", None).steps == 40


def test_what_is_offered_is_what_the_file_of_its_plan_said_at_the_start(tmp_path):
    ratios, buckets = tmp_path / "ratios.json", tmp_path / "buckets.json"
    ratios.write_text('{"ratios": [0.1, 0.3]}')
    plan = f"coredit:{ratios}"
    buckets.write_text(json.dumps({"wan": FILE["wan"] | {"plans": {"fast": {"plan": plan, "steps": 4}}}}))
    wan = read_buckets(str(buckets), ["wan"])["wan"]
    ratios.unlink()
    asked = Request(prompt="a", plan=wan.offer(None, plan, None).plan)
    [coredit] = fill(asked, Defaults(), "guidance").plan.methods
    assert coredit.ratios == (0.1, 0.3)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (("best", None, None), "quality 'best' is not served: expected one of high .dense, 50 steps.,"),
        ((None, "hsa:25", None), "plan 'hsa:25' is not served"),
        ((None, "hsa", None), "hsa"),
        (("high", None, 20), "20 steps of dense are not served: expected 50"),
        ((None, "dense", 30), "30 steps of dense are not served: expected 50"),
    ],
)
def test_what_is_not_served_is_told(wan, asked, words):
    with pytest.raises(UserError, match=words):
        wan.offer(*asked)


def test_the_nearest_shapes_are_told(wan):
    wan.check(Frame(832, 480, 49))
    with pytest.raises(UserError, match=r"832x480x80 is not served.*nearest are 832x480x81, 832x480x49, 480x832x81"):
        wan.check(Frame(832, 480, 80))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shapes": []}, "0 shapes"),
        ({"shapes": ["big"]}, "'big' is not understood"),
        ({"shapes": ["1x2x3x4"]}, "understood"),
        ({"plans": {"high": "dense"}}, "is not understood"),
        ({"plans": {"high": {"plan": "what", "steps": 2}}}, "what"),
        ({"batches": [2]}, "1 among the batches"),
    ],
)
def test_a_file_that_is_wrong_is_refused(tmp_path, change, words):
    (tmp_path / "b.json").write_text(json.dumps({"wan": FILE["wan"] | change}))
    with pytest.raises(UserError, match=words):
        read_buckets(str(tmp_path / "b.json"), ["wan"])


def test_a_model_without_buckets_is_named(tmp_path):
    with pytest.raises(UserError, match="no buckets for 'other': expected an entry named 'other'"):
        read_buckets("demo", ["demo-wan", "other"])
    with pytest.raises(UserError, match="expected a JSON file or one of demo, quick"):
        read_buckets("nothing", ["demo-wan"])
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(UserError, match="expected JSON"):
        read_buckets(str(tmp_path / "b.json"), ["wan"])


def test_the_shipped_preset_has_shapes_and_plans_enough():
    told = read_buckets("demo", ["demo-wan", "demo-flux"])
    for buckets in told.values():
        assert len(buckets.shapes) >= 4 and len(set(buckets.offers.values())) >= 3
    assert {file.stem for file in PRESETS.glob("*.json")} == {"demo", "quick"}
