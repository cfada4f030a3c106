"""A server that is killed in the middle of its work: whatever it has accepted is made by the next one."""

import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import av
import httpx
import pytest

# A job that a server dies of thrice is given up: here each of twenty kills may find the same one under way.
PATIENT = """
import logging, sys
logging.basicConfig(level=logging.INFO)
import infer.serve, infer.video_jobs
infer.video_jobs.MOST_ATTEMPTS = 99
sys.exit(infer.serve.main())
"""
BUCKETS = {
    "tiny-t2v": {
        "shapes": ["48x32x9"],
        "plans": {"high": {"plan": "dense", "steps": 16}, "fast": {"plan": "dense", "steps": 4}},
        "batches": [1],
    }
}


class Served:
    """`dit-serve` as a process of its own, with a folder of jobs and a store of programs that outlive it."""

    def __init__(self, model, folder):
        (folder / "buckets.json").write_text(json.dumps(BUCKETS))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.command = [
            sys.executable, "-c", PATIENT, "--model", str(model), "--buckets", str(folder / "buckets.json"),
            "--data", str(folder / "data"), "--port", str(port),
        ]  # fmt: skip
        self.log = folder / "log"
        self.caches = os.environ | {"XDG_CACHE_HOME": str(folder / "caches")}
        self.process = None

    def start(self, wait_for="ready"):
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, env=self.caches, stderr=log)
        began = time.monotonic()
        while True:
            assert self.process.poll() is None and time.monotonic() - began < 600, self.log.read_text()[-2000:]
            try:
                if httpx.get(f"{self.url}/health/{wait_for}").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@pytest.fixture
def server(text_to_video, tmp_path):
    made = Served(text_to_video[0], tmp_path)
    yield made
    if made.process is not None and made.process.poll() is None:
        made.kill()


def asked_until(server, moment, rng):
    """Ids of what the server accepted before the moment came."""
    accepted = []
    while time.monotonic() < moment:
        asked = {"prompt": "a red cat runs", "seed": rng.randrange(99), "quality": rng.choice(["high", "fast"])}
        answer = httpx.post(f"{server.url}/v1/videos", json=asked, timeout=30)
        if answer.status_code == 200:
            accepted.append(answer.json()["id"])
        time.sleep(rng.uniform(0, 0.3))
    return accepted


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.long)])
def test_no_job_is_lost(server, kills):
    rng = random.Random(kills)
    accepted = []
    for _ in range(kills):
        server.start()
        accepted += asked_until(server, time.monotonic() + rng.uniform(0.2, 2.5), rng)
        server.kill()
    server.start()
    left = set(accepted)
    assert len(left) >= kills
    began = time.monotonic()
    while left:
        assert time.monotonic() - began < 1200, f"{len(left)} jobs of {len(accepted)} have not ended"
        for id in sorted(left):
            video = httpx.get(f"{server.url}/v1/videos/{id}").json()
            if video["status"] in ("completed", "failed"):
                assert video["status"] == "completed", video
                left.remove(id)
        time.sleep(0.2)
    by_seed = {}
    for id in accepted:
        content = httpx.get(f"{server.url}/v1/videos/{id}/content").content
        with av.open(io.BytesIO(content)) as container:
            assert len(list(container.decode(video=0))) == 9
        video = httpx.get(f"{server.url}/v1/videos/{id}").json()
        by_seed.setdefault((video["seed"], video["quality"]), set()).add(content)
    assert all(len(same) == 1 for same in by_seed.values()) and len(by_seed) > 1
    assert server.stop() == 0


def test_a_stop_ends_a_server_that_still_compiles(server):
    server.start(wait_for="live")
    began = time.monotonic()
    assert server.stop() == 0 and time.monotonic() - began < 20
    assert "ready in" not in server.log.read_text()


def test_a_stop_in_order_finishes_what_runs(server):
    server.start()
    ids = [httpx.post(f"{server.url}/v1/videos", json={"prompt": f"a cat {n}"}).json()["id"] for n in range(3)]
    assert server.stop() == 0
    server.start()
    began = time.monotonic()
    for id in ids:
        while httpx.get(f"{server.url}/v1/videos/{id}").json()["status"] != "completed":
            assert time.monotonic() - began < 120
            time.sleep(0.1)
    ready = [line for line in server.log.read_text().splitlines() if "ready in" in line]
    assert len(ready) == 2 and " 0 programs compiled" in ready[1]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--host", "0.0.0.0"], "can be reached from other machines: expected --api-key-file"),
        (["--buckets", "nothing"], "cannot read buckets from 'nothing'"),
        (["--queue", "0"], "--queue is 0"),
        (["--model", "nowhere"], "no buckets for 'nowhere'"),
        (["--host", "192.0.2.1", "--api-key-file", "keys"], "cannot listen at 192.0.2.1, port 8000"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(words, found, capsys):
    from infer.serve import main

    assert main(["--model", "demo-wan", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("dit-serve: ") and found in said and said.count("\n") == 1


def test_a_port_that_is_taken_is_told_of_at_once(capsys):
    from infer.serve import main

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["--model", "demo-wan", "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot listen at 127.0.0.1" in capsys.readouterr().err
