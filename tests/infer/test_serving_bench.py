"""The figures of serving, on a tiny model."""

import json

from infer import serving_bench

PLANS = {"high": {"plan": "dense", "steps": 4}}
BUCKETS = {"tiny-t2v": {"shapes": ["48x32x5", "32x32x5"], "plans": PLANS, "batches": [1]}}


def test_what_the_engine_adds_is_told(text_to_video, tmp_path, capsys):
    buckets, report = tmp_path / "buckets.json", tmp_path / "report.json"
    buckets.write_text(json.dumps(BUCKETS))
    words = ["--buckets", str(buckets), "--rounds", "2", "--batch", "2", "--only", "engine", "--json", str(report)]
    assert serving_bench.main(["--model", str(text_to_video[0]), *words]) == 0
    told = json.loads(report.read_text())
    assert told == json.loads(capsys.readouterr().out)
    by_shape = told["engine"][str(text_to_video[0])]
    assert list(by_shape) == ["48x32x5", "32x32x5"]
    for found in by_shape.values():
        assert found["steps"] == 4 and found["batch"] == 2
        assert found["together"] > 0.5 * found["engine"] > 0
        assert abs(found["engine_overhead"] - (found["engine"] / found["pipeline"] - 1)) < 0.01
        assert abs(found["batched_throughput"] - found["one_by_one"] / found["together"]) < 0.01
