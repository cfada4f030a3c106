"""What the benchmarks print."""

import json

from infer import bench


def test_every_time_is_under_its_own_name(monkeypatch, capsys):
    monkeypatch.setattr(bench, "alternate", lambda programs, rounds: dict(zip(programs, (3.0, 1.5), strict=True)))
    monkeypatch.setattr("sys.argv", ["bench", "compile", "--json"])
    bench.main()
    assert json.loads(capsys.readouterr().out) == {"bench": "compile", "ratio": 2.0, "40 blocks": 3.0, "4 blocks": 1.5}
