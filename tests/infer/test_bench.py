"""What the benchmarks print."""

import json

import pytest

from infer import bench


def test_a_step_of_any_sizes_is_timed_beside_torch(monkeypatch, capsys):
    pytest.importorskip("torch")
    monkeypatch.setattr("sys.argv", ["bench", "dit", "--random", "32x2x60", "--rounds", "1", "--json"])
    bench.main()
    found = json.loads(capsys.readouterr().out)
    assert found["bench"] == "dit" and found["ours"] > 0 and found["torch"] > 0


def test_every_time_is_under_its_own_name(monkeypatch, capsys):
    monkeypatch.setattr(bench, "alternate", lambda programs, rounds: dict(zip(programs, (3.0, 1.5), strict=True)))
    monkeypatch.setattr("sys.argv", ["bench", "compile", "--json"])
    bench.main()
    assert json.loads(capsys.readouterr().out) == {"bench": "compile", "ratio": 2.0, "40 blocks": 3.0, "4 blocks": 1.5}
