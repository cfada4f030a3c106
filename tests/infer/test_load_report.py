"""What a load test makes of its requests, and of the server's memory."""

import asyncio
import mmap
import os
import subprocess
import sys

import numpy as np
import pytest

from infer import load_report, load_watch
from infer.load_loops import Record, usual_seconds
from infer.load_mix import Kind

FILMS = Kind(model="films", shape="64x64x17", quality="high", video=True)
PICTURES = Kind(model="pictures", shape="64x64", quality="high", video=False)


def record(seconds=1.0, outcome="ok", kind=FILMS, **told):
    return Record(**{"way": "poll", "bad": None, "due": 0.0, "late": 0.0} | told, kind=kind, seconds=seconds,
                  outcome=outcome)  # fmt: skip


def test_what_usually_takes_long_is_given_up_later():
    records = [record(seconds) for seconds in (2.0, 4.0, 6.0)]
    records += [record(9.0, kind=PICTURES), record(100.0, "error"), record(0.1, "cancelled")]
    assert usual_seconds(records, FILMS) == 4.0 and usual_seconds(records, PICTURES) == 9.0
    assert usual_seconds(records[:3], PICTURES) == 4.0


def test_percentiles_are_of_what_was_answered():
    slow = [record(seconds / 100, stages={"queue": seconds}) for seconds in range(101)]
    records = [*slow, record(9.0, kind=PICTURES, late=0.5), record(50.0, "cancelled"), record(60.0, "error")]
    found = load_report.summary(records, 10.0)
    assert found["latency"]["films 64x64x17 high"] == pytest.approx(
        {"count": 101, "p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
    )
    assert found["latency"]["all"]["count"] == 102 and found["latency"]["pictures 64x64 high"]["p99"] == 9.0
    assert found["stages"]["films 64x64x17 high"]["queue"]["p50"] == 50.0
    assert (found["sent_rate"], found["answered_rate"], found["late_seconds"]) == (10.4, 10.2, 0.5)
    assert found["outcomes"] == {"ok": 102, "cancelled": 1, "refused": 0, "full": 0, "error": 1}
    assert load_report.summary([], 10.0)["latency"] == {"all": {"count": 0}}


def test_a_process_that_ends_is_a_problem():
    memory = load_watch.Memory()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:

        async def watched():
            watching = asyncio.create_task(memory.watch(other.pid, every=0.01))
            while not memory.bytes:
                await asyncio.sleep(0.01)
            other.stdin.close()
            await asyncio.wait_for(watching, 60)

        asyncio.run(watched())
    assert memory.gone and len(memory.bytes) == len(memory.seconds)
    assert load_report.problems(None, memory.gone, None, None) == ["the server's process is gone"]


def test_memory_of_this_process_is_what_it_takes():
    before = load_watch.resident_bytes(os.getpid())
    with mmap.mmap(-1, 2**26) as block:  # new pages, where an allocation may get used ones
        np.frombuffer(block, np.uint8)[:] = 1
        grown = load_watch.resident_bytes(os.getpid()) - before
    assert 0.9 * 2**26 < grown < 1.5 * 2**26


def test_growth_is_that_after_the_warm_up():
    memory = load_watch.Memory(seconds=list(range(100)), bytes=[10] * 10 + [100] * 50 + [500] + [100] * 30 + [103] * 9)
    found = memory.summary()
    assert found["first_bytes"] == 100 and found["last_bytes"] == 103 and found["most_bytes"] == 500
    assert found["growth"] == pytest.approx(0.03)
    assert load_report.problems(found, False, None, 0.05) == []
    assert "grew by 3.0%" in load_report.problems(found, False, None, 0.02)[0]
    assert load_watch.Memory(seconds=[0, 1], bytes=[1, 2]).summary() is None
