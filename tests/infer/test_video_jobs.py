"""Jobs of videos without any model: what a server that starts makes of those of the last one, and how they are told."""

import asyncio
import threading
import time
from types import SimpleNamespace

import pytest

from infer import video_jobs
from infer.asked import Asked
from infer.engine import Engine
from infer.journal import Journal
from infer.tickets import Progress
from infer.video_jobs import VideoJobs

REQUEST = {"prompt": "a cat", "size": "48x32", "frames": 5, "fps": 16, "seed": 1, "plan": "dense", "quality": "high"}
JOB = SimpleNamespace(prompts=["a cat"], steps=8, frames=5, size=(48, 32), seeds=[1], plan="dense")


@pytest.fixture(autouse=True)
def any_request(monkeypatch):
    asked = Asked(model="tiny", job=JOB, quality="high", fps=16)
    monkeypatch.setattr(video_jobs, "asked_of", lambda *_: asked)


@pytest.fixture
def opened(tmp_path):
    """A function that makes the jobs of a server that starts, whose engine never does."""
    made = []

    def start():
        for jobs in made:
            jobs.journal.close()
        made.append(VideoJobs(Engine({}, {}), Journal(tmp_path / "data", quota_bytes=2**20, lifetime_seconds=60)))
        return made[-1]

    yield start
    made[-1].engine.stop(0)
    for jobs in made:
        jobs.close()
        jobs.journal.close()


def accept(jobs, **told):
    return jobs.journal.accept(kind="video", model="tiny", owner="", request=REQUEST | told).id


def begin(jobs, id):
    """The engine takes the job on."""
    jobs._live[id].ticket.told(Progress(done=0, steps=8))
    jobs._writer.submit(lambda: None).result()


def test_a_request_that_is_not_taken_any_more_fails_alone(opened):
    jobs = opened()
    old, good = accept(jobs, frames=10**9), accept(jobs)
    jobs = opened()
    assert jobs.resume() == 2
    error = jobs.get(old, "").error
    assert error["code"] == "invalid_request_error" and "frames: input should be less" in error["message"]
    assert jobs.get(good, "").status == "queued" and list(jobs._live) == [good]


def test_what_goes_wrong_with_a_stored_job_is_its_own(opened, monkeypatch):
    first = opened()
    bad = accept(first)

    def broken(*_):
        raise KeyError("a bug")

    monkeypatch.setattr(video_jobs, "asked_of", broken)
    jobs = opened()
    jobs.resume()
    assert jobs.get(bad, "").error == {"code": "server_error", "message": "the job failed: KeyError"}


def test_a_job_that_kills_its_server_is_given_up(opened):
    jobs = opened()
    deadly, waiting = accept(jobs), accept(jobs)
    for _ in range(3):
        jobs = opened()
        jobs.resume()
        begin(jobs, deadly)
        assert jobs.get(deadly, "").status == "in_progress"
    jobs = opened()
    jobs.resume()
    assert "died 3 times" in jobs.get(deadly, "").error["message"]
    assert jobs.get(waiting, "").status == "queued" and list(jobs._live) == [waiting]


def test_a_stop_in_order_is_no_attempt(opened):
    jobs = opened()
    id = accept(jobs)
    for _ in range(4):
        jobs = opened()
        jobs.resume()
        begin(jobs, id)
        jobs.engine.stop(0)
        jobs.close()
    assert jobs.journal.get(id, "").status == "queued" and jobs.journal.get(id, "").attempts == 0


def test_only_what_is_made_waits_for_room(opened):
    jobs = opened()
    id = accept(jobs)
    jobs.resume()
    jobs._room = threading.Semaphore(0)
    cancelling = threading.Thread(target=jobs._live[id].ticket.cancel, daemon=True)
    cancelling.start()
    cancelling.join(10)
    assert not cancelling.is_alive()
    jobs.close()
    assert jobs.get(id, "").error["code"] == "cancelled" and not jobs._room.acquire(blocking=False)


def test_events_tell_of_an_end_that_comes_while_the_job_is_read(opened, monkeypatch):
    jobs = opened()
    id = accept(jobs)
    jobs.resume()
    read = jobs.get

    def slowly(*whose):
        video = read(*whose)
        if id in jobs._live:
            jobs._live[id].ticket.cancel()
            while id in jobs._live:
                time.sleep(0.01)
        return video

    monkeypatch.setattr(jobs, "get", slowly)

    async def statuses():
        return [video.status async for video, _ in jobs.events(id, "", previews=False)]

    assert asyncio.run(statuses()) == ["queued", "failed"]
