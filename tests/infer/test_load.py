"""`dit-load` against a server whose faults are known."""

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from load_target import MODELS, TIMINGS, Target, served
from PIL import Image

from infer import load, load_client, load_watch
from infer.load_bad import BAD
from infer.load_mix import Shares, read_mix

HALF_A_SECOND = ["--minutes", str(0.5 / 60)]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(load_client, "POLL", 0.02)
    monkeypatch.setattr(load_watch, "SETTLE", 0.0)
    monkeypatch.setattr("infer.load_loops.FIRST_USUAL", 0.02)


@pytest.fixture(scope="module")
def server():
    target = Target()
    with served(target) as url:
        yield target, url


@pytest.fixture
def target(server):
    server[0].__init__()
    return server[0]


@pytest.fixture
def run(server, target, tmp_path, capsys):
    """Runs the command against the target; its exit code, its report (or what it complains of) and what it prints."""

    def run(*arguments):
        file = tmp_path / "load.json"
        file.unlink(missing_ok=True)
        code = load.main([server[1], *HALF_A_SECOND, "--json", str(file), *map(str, arguments)])
        printed = capsys.readouterr()
        return code, json.loads(file.read_text()) if file.exists() else printed.err, printed.out

    return run


def test_everything_that_is_served_is_asked_for_and_answered(run, target):
    code, report, printed = run("--rate", 80, "--mix", "films=1,pictures=4")
    counts = report["outcomes"]
    assert code == 0 and counts["ok"] == report["sent"] > 25 and sum(counts.values()) == report["sent"]
    kinds = {"films 64x64x17 high", "films 64x64x17 fast", "films 64x32x9 high", "films 64x32x9 fast"}
    assert set(report["latency"]) == {"all", "pictures 64x64 high", *kinds}
    assert {one["way"] for one in report["requests"]} == {"whole", "url", "stream", "poll", "events"}
    assert report["stages"]["all"]["queue"] == {"count": report["sent"]} | dict.fromkeys(
        ("p50", "p90", "p95", "p99"), TIMINGS["queue"]
    )
    assert report["latency"]["all"]["p50"] >= target.seconds
    assert target.deleted > 0
    assert report["metrics"] == {"compilations": 0, "waiting": 0, "running": 0} and report["problems"] == []
    assert "films 64x32x9 fast" in printed and f"{report['sent']} answered" in printed


def test_fields_of_the_report(run):
    _, report, _ = run("--rate", 20)
    assert set(report) == {
        "server", "rate", "minutes", "seed", "shares", "capacity", "sent", "sent_rate", "answered_rate", "late_seconds",
        "outcomes", "errors", "latency", "stages", "refusals", "memory", "memory_samples", "metrics", "problems",
        "requests",
    }  # fmt: skip
    assert set(report["requests"][0]) == {
        "kind", "way", "bad", "due", "late", "seconds", "outcome", "reason", "status", "stages",
    }  # fmt: skip


def test_requests_are_sent_however_long_the_others_take(run, target):
    target.expecting = len(read_mix({"data": MODELS}, None, None, 0).arrivals(random.Random(0), 60, 0.5, Shares()))
    code, report, _ = run("--rate", 60)
    assert code == 0 and report["outcomes"]["ok"] == report["sent"] == target.expecting > 20
    dues = [one["due"] for one in report["requests"]]
    assert all(0 <= due < 0.5 for due in dues) and all(one["late"] >= 0 for one in report["requests"])
    assert report["late_seconds"] == max(one["late"] for one in report["requests"])
    ends = [one["due"] + one["seconds"] for one in report["requests"]]
    assert min(ends) > max(dues), "none was answered before the last was sent"


def test_videos_are_given_up(run, target):
    target.hanging = True
    code, report, _ = run("--rate", 40, "--cancels", 1.0, "--mix", "films=1")
    assert code == 0 and report["outcomes"]["cancelled"] == report["sent"] == len(target.videos) > 10
    assert {video["status"] for video in target.videos.values()} == {"failed"}


def test_images_are_given_up(run, target):
    target.expecting = 1000
    code, report, _ = run("--rate", 40, "--cancels", 1.0, "--mix", "pictures=1")
    assert code == 0 and report["outcomes"]["cancelled"] == report["sent"] > 10
    assert {one["way"] for one in report["requests"]} == {"whole", "url", "stream"}


def asked(url, arrivals, patience=None):
    """Answers to requests, one after the other."""

    async def all_of_them():
        async with load_client.connected(url, None) as http:
            return [await load_client.ask(http, arrival, 60.0, patience) for arrival in arrivals]

    return asyncio.run(all_of_them())


@pytest.mark.parametrize("name", ["films=1", "pictures=1"])
def test_every_kind_of_malformed_request_is_refused(server, target, name):
    one = read_mix({"data": MODELS}, name, None, 0).draw(random.Random(0))
    answers = asked(server[1], [replace(one, bad=bad) for bad in BAD])
    found = {bad: (answer.outcome, answer.reason) for bad, answer in zip(BAD, answers, strict=True)}
    assert found == dict.fromkeys(BAD, ("refused", "")) and target.came == 0
    assert all(400 <= answer.status < 500 for answer in answers)


def test_malformed_requests_are_told_of_by_name(run):
    code, report, _ = run("--rate", 40, "--bad", 1.0)
    assert code == 0 and report["outcomes"]["refused"] == report["sent"] > 10
    assert sum(sum(found.values()) for found in report["refusals"].values()) == report["sent"]
    assert set(report["refusals"]) <= set(BAD) and len(report["refusals"]) > 5


def test_a_malformed_request_that_is_accepted_is_an_error(run, target):
    target.trusting = True
    code, report, printed = run("--rate", 40, "--bad", 1.0)
    assert code == 1 and any(" was accepted with a 200" in reason for reason in report["errors"])
    assert "error: " in printed and " was accepted with a 200 (" in printed


def test_a_failing_server(run, target):
    target.fail_every = 4
    code, report, _ = run("--rate", 40)
    assert code == 1 and report["errors"] == {"500: the server failed": target.came // 4}


def test_a_full_server_is_no_error(run, target):
    target.full_every = 4
    code, report, _ = run("--rate", 40)
    assert code == 0 and report["outcomes"]["full"] == target.came // 4


@pytest.mark.parametrize(
    ("fault", "mix", "reasons"),
    [
        ("hanging", "films=1", {"no end within 0.5 s"}),
        ("failing", "films=1", {"a job failed: server_error: it broke"}),
        ("hollow", "films=1", {"the content of a completed job has 0 bytes and is no MP4"}),
        ("hollow", "pictures=1", {"an image of 0 bytes that is none"}),
    ],
)
def test_jobs_that_do_not_end_as_they_should(run, target, fault, mix, reasons):
    setattr(target, fault, True)
    code, report, _ = run("--rate", 30, "--limit", 0.5 if fault == "hanging" else 60, "--mix", mix)
    assert code == 1 and set(report["errors"]) == reasons
    assert report["outcomes"]["error"] == report["sent"]


@pytest.mark.parametrize(
    ("name", "way", "reason"),
    [
        ("pictures=1", "stream", "a stream that ended without an image, but with image_generation.partial_image"),
        ("films=1", "events", "the events of a job ended while it was queued"),
    ],
)
def test_events_that_end_too_early(server, target, name, way, reason):
    target.cutting = target.hanging = True
    one = read_mix({"data": MODELS}, name, None, 0).draw(random.Random(0))
    (answer,) = asked(server[1], [replace(one, way=way)])
    assert (answer.outcome, answer.reason) == ("error", reason)


def test_a_cancel_that_is_not_heard_is_an_error_unless_the_job_is_done(run, target):
    target.hanging = target.deaf = True
    code, report, _ = run("--rate", 20, "--limit", 0.5, "--cancels", 1.0, "--mix", "films=1")
    assert code == 1 and report["errors"] == {"no end within 0.5 s": report["sent"]}
    target.hanging = False
    code, report, _ = run("--rate", 20, "--cancels", 1.0, "--mix", "films=1")
    assert code == 0 and report["outcomes"]["ok"] == report["sent"]


def test_a_server_that_goes_away(target, capsys):
    with served(target) as url:
        pass
    assert load.main([url, *HALF_A_SECOND]) == 2
    assert "lists no models" in capsys.readouterr().err


def test_a_broken_connection_is_an_error():
    (answer,) = asked("http://127.0.0.1:9", [read_mix({"data": MODELS}, None, None, 0).draw(random.Random(0))])
    assert answer.outcome == "error" and answer.reason == "broken connection: ConnectError"


def test_compilations_and_leftovers_are_problems(run, target):
    target.compilations, target.waiting = [3, 5], 2
    code, report, printed = run("--rate", 10)
    assert code == 1 and report["outcomes"]["error"] == 0
    assert report["problems"] == [
        "2 programs were compiled during the load: expected none",
        "2 samples wait and 0 run after the last request has ended: expected none",
    ]
    assert "problem: 2 programs" in printed


def test_metrics_that_cannot_be_had(run, target):
    target.silent = True
    code, report, _ = run("--rate", 10)
    assert code == 1 and report["problems"] == ["/metrics told nothing: expected those of dit-serve"]
    code, report, _ = run("--rate", 10, "--no-metrics")
    assert code == 0 and report["metrics"] is None


def test_the_share_of_a_capacity(run, target):
    target.seconds = 0.1
    code, report, _ = run("--rate", "50%", "--calibrate", 0.6, "--workers", 4, "--bad", 0.5)
    capacity = report["capacity"]
    assert code == 0 and capacity["errors"] == []
    assert 0 < capacity["rate"] <= 40, "four at a time, a tenth of a second each"
    assert report["rate"] == pytest.approx(0.5 * capacity["rate"] / 0.5)


def test_no_capacity_where_nothing_is_answered(run, target):
    target.fail_every = 1
    code, error, _ = run("--rate", "80%", "--calibrate", 0.2)
    assert code == 2 and "'500: the server failed'" in error


def test_memory_is_watched_until_the_process_is_gone(run):
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as other:
        code, report, _ = run("--rate", 20, "--pid", other.pid)
        assert code == 0 and report["memory_samples"]["bytes"][0] > 2**20
        code, report, _ = run("--rate", 20, "--pid", other.pid, "--most-growth", 5)
        assert code == 1 and report["problems"] == ["memory was seen too short to tell its growth"]
        other.terminate()
        while True:  # it has no memory any more before its parent knows of its end
            try:
                load_watch.resident_bytes(other.pid)
            except ProcessLookupError:
                break
            time.sleep(0.01)
        code, error, _ = run("--rate", 20, "--pid", other.pid)
        assert code == 2 and f"--pid {other.pid} cannot be watched" in error


def test_prompts_from_a_file(run, tmp_path, target):
    (tmp_path / "prompts.txt").write_text("an otter\n\n")
    assert run("--rate", 20, "--prompts", tmp_path / "prompts.txt")[0] == 0
    assert {told["prompt"] for told in target.told} == {"an otter"}


def test_a_form_carries_what_json_does(run, target):
    assert run("--rate", 60, "--mix", "films:64x64x17:high=1")[0] == 0
    forms = [told for told in target.told if isinstance(told["seed"], str)]
    assert 0 < len(forms) < len(target.told)
    names = {"model", "prompt", "size", "quality", "seed", "frames"}
    assert all(set(told) - {"input_reference"} == names for told in target.told)
    assert any("input_reference" in told for told in forms)


def test_a_plot(run, target, tmp_path):
    pytest.importorskip("matplotlib")
    target.fail_every = 9
    arguments = ["--cancels", 0.2, "--bad", 0.2, "--pid", os.getpid(), "--plot", tmp_path / "load.png"]
    assert run("--rate", 60, *arguments)[0] == 1
    with Image.open(tmp_path / "load.png") as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(2**24)) > 20


def test_a_key_is_sent(run, target, tmp_path):
    target.keys = {"a-long-and-secret-key"}
    code, error, _ = run("--rate", 20)
    assert code == 2 and "--api-key-file" in error
    (tmp_path / "keys.txt").write_text("# of tests\n\na-long-and-secret-key  # one\nanother-long-key\n")
    assert run("--rate", 20, "--api-key-file", tmp_path / "keys.txt")[0] == 0


def test_a_server_that_is_not_ready(run, target):
    target.ready = False
    code, error, _ = run("--rate", 20)
    assert code == 2 and "is not ready" in error


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--rate", "much"], "--rate 'much' is no rate"),
        (["--rate", "0"], "--rate '0' is no rate"),
        (["--rate", "nan"], "--rate 'nan' is no rate"),
        (["--rate", "80%", "--bad", "1"], "--bad leaves no sound request"),
        (["--minutes", "0"], "--minutes is 0.0: expected a number above 0"),
        (["--workers", "0"], "--workers is 0"),
        (["--cancels", "0.6", "--bad", "0.6"], "are no shares of all requests"),
        (["--cancels", "-0.1"], "are no shares of all requests"),
        (["--most-growth", "5"], "expected --pid with it"),
        (["--pid", "999999999"], "--pid 999999999 cannot be watched"),
        (["--plot", "load.svg"], "expected a name that ends in .png"),
        (["--json", "/dev/null/load.json"], "cannot write"),
        (["--rate", "9", "--prompts", "/no/such/file"], "cannot read the prompts"),
        (["--api-key-file", "/no/such/file"], "/no/such/file: No such file"),
    ],
)
def test_bad_options(arguments, sentence, capsys):
    assert load.main(["http://127.0.0.1:9", *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_an_address_without_a_scheme(capsys):
    assert load.main(["127.0.0.1:8000"]) == 2
    assert "expected a URL such as http://127.0.0.1:8000" in capsys.readouterr().err


def test_no_plot_without_matplotlib(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert load.main(["http://127.0.0.1:9", "--plot", "load.png"]) == 2
    assert "run pip install dit-jax[train]" in capsys.readouterr().err
