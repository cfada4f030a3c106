"""`train.equal_time`: its parts are commands that exist, and its table says what `dit-bench` has found."""

import json

import pytest

from dit_jax.methods.plan import parse_plan
from infer import adapt, calibrate, plan_bench, prune
from infer.bench_entries import parse_entries
from train.equal_time import SCORES, Table, bench, plans, prepared, short, table

PARSERS = {"dit-adapt": adapt.parser, "dit-calibrate": calibrate.parser, "dit-prune": prune.parser}


@pytest.fixture(params=["demo-flux", "demo-wan"])
def asked(request, tmp_path):
    return Table(model=request.param, out=tmp_path, samples=8)


def test_every_part_is_a_command_behind_what_it_needs(asked):
    there = set()
    for stage in prepared(asked):
        assert stage.name not in there and there >= set(stage.after)
        there.add(stage.name)
        command, *words = stage.command
        if command in PARSERS:
            assert PARSERS[command]().parse_args(words).out == stage.makes
        else:
            assert command == "python"
    options = plan_bench.parser().parse_args(bench(asked).command[1:])
    assert str(options.json) == str(asked.path("table.json")) and str(options.keep) == str(asked.path("samples"))


def test_plans_use_what_is_made(asked, monkeypatch):
    made = {stage.makes for stage in prepared(asked)}
    named = {
        word for plan in plans(asked) for word in plan.replace("+", ":").replace("=", ":").split(":") if "/" in word
    }
    assert named == {str(path) for path in made if path.name != "prompts.txt"}
    read = []
    monkeypatch.setattr("infer.bench_entries.parse_plan", lambda text: read.append(text) or parse_plan("dense"))
    entries = parse_entries(",".join(plans(asked)))
    assert len(entries) == len(plans(asked)) + 1
    assert sorted({entry.steps for entry in entries if entry.steps}) == [10, 11, 20, 22, 30, 33]
    assert {text.partition(":")[0] for text in read} == {
        "dense", "hsa", "taylorseer", "teacache", "magcache", "coredit", "routing", "ddit",
    }  # fmt: skip


def _row(plan, seconds, **settings):
    margins = dict.fromkeys(("psnr", "ssim", "frechet", "digit", "colour", "count", "direction"), 0.01)
    usual = {"psnr": 31.44, "ssim": 0.9, "frechet": 12.3, "digit": 0.85, "colour": 0.9, "count": 0.8, "direction": 0.7}
    speed = {"predicted_speedup": 2.0, "measured_speedup": 8.0 / seconds}
    return {"plan": plan, "seconds": seconds, "margins": margins, **usual, **speed} | settings


def test_the_table_says_what_was_found(asked):
    rows = [_row("dense", 8.0, psnr=None, ssim=None), _row("magcache:0.1:ratios=runs/x/mag.json:k=10", 4.0)]
    head, line, dense, other = table(asked.model, json.loads(json.dumps(rows))).splitlines()
    assert head.count("|") == line.count("|") == dense.count("|") == other.count("|") == 8 + len(SCORES[asked.model])
    assert dense.startswith("| `dense` | 8.00 | 100% | 2.00 / 1.00 |  |  | 12.3 ± 0.0 | 85 ± 1 | 90 ± 1 |")
    assert other.startswith(
        "| `magcache:0.1:ratios=mag.json:k=10` | 4.00 | 50% | 2.00 / 2.00 | 31.4 ± 0.0 | 0.900 ± 0.010 |"
    )


def test_files_go_by_their_names():
    assert short("dense:20+on:runs/x/adapted+ddit:2p@4-19") == "dense:20+on:adapted+ddit:2p@4-19"
    assert short("on:/a/b/pruned0.3") == "on:pruned0.3" and short("hsa:50") == "hsa:50"
