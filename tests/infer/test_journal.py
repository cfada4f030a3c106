"""Jobs that survive a restart: their lives, whose they are, paging, the quota, damage."""

import os
import random
import sqlite3
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

import infer.journal
from dit_jax.config import UserError
from infer.job_records import APPLICATION
from infer.journal import Journal

ME, OTHER = "ab" * 32, "22" * 32
PICTURE = {"reference.png": b"a picture"}


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def opened(tmp_path, clock):
    """A function that opens the journal of the test's folder; what it opened is closed in the end."""
    journals = []

    def open_again(**options):
        for journal in journals:
            journal.close()
        journals.append(
            Journal(tmp_path / "jobs", **dict(quota_bytes=1000, lifetime_seconds=60, clock=clock) | options)
        )
        return journals[-1]

    yield open_again
    for journal in journals:
        journal.close()


def accept(journal, kind="video", owner=ME, **options):
    return journal.accept(kind=kind, model="demo-wan", owner=owner, request={"prompt": "ein \ud800 7"}, **options)


def done(journal, files=None, **options):
    record = accept(journal, **options)
    assert journal.started(record.id) and journal.completed(
        record.id, {"seconds": 2.5}, files or {"video.mp4": b"film"}
    )
    return record.id


def lying(journal, id):
    folder = journal._jobs / id
    return {file.name: file.read_bytes() for file in folder.iterdir()} if folder.exists() else {}


def test_a_job_from_acceptance_to_its_result(opened, clock):
    journal = opened()
    record = accept(journal, inputs=PICTURE)
    assert journal.get(record.id, ME) == record and journal.unfinished() == [record]
    assert (record.status, record.created, record.inputs) == ("queued", 1000.0, ("reference.png",))
    assert record.id.startswith("video_") and len(record.id) == len("video_") + 32
    assert accept(journal, kind="image").id.startswith("image_")
    assert journal.file(record.id, ME, "reference.png").read_bytes() == b"a picture"
    clock.now = 1001.0
    assert journal.started(record.id)
    assert (journal.get(record.id, ME).status, journal.get(record.id, ME).started) == ("in_progress", 1001.0)
    clock.now = 1005.0
    assert journal.completed(record.id, {"seconds": 4.0, "plan": "hsa:50"}, {"video.mp4": b"film", "last.png": b"end"})
    ended = journal.get(record.id, ME)
    assert (ended.status, ended.ended, ended.expires) == ("completed", 1005.0, 1065.0)
    assert ended.result == {"seconds": 4.0, "plan": "hsa:50"} and ended.error is None
    assert (ended.inputs, ended.files) == ((), ("video.mp4", "last.png"))
    assert journal.file(record.id, ME, "video.mp4").read_bytes() == b"film"
    assert lying(journal, record.id) == {"video.mp4": b"film", "last.png": b"end"}


def test_a_job_that_fails_keeps_its_reason_and_no_file(opened):
    journal = opened()
    record = accept(journal, inputs=PICTURE)
    assert journal.failed(record.id, "cancelled", "the client cancelled it")
    ended = opened().get(record.id, ME)
    assert (ended.status, ended.expires, ended.inputs) == ("failed", 1060.0, ())
    assert ended.error == {"code": "cancelled", "message": "the client cancelled it"}
    assert lying(journal, record.id) == {}


def test_a_job_ends_once(opened):
    journal = opened()
    id = done(journal)
    assert not journal.failed(id, "cancelled", "too late")
    assert not journal.completed(id, {}, {"video.mp4": b"another"}) and not journal.started(id)
    assert lying(journal, id) == {"video.mp4": b"film"} and journal.get(id, ME).result == {"seconds": 2.5}
    running = accept(journal)
    assert journal.started(running.id) and not journal.started(running.id)
    assert journal.deleted(running.id, ME)
    assert not journal.completed(running.id, {}, {"video.mp4": b"film"}) and not journal.failed(running.id, "a", "b")
    assert lying(journal, running.id) == {} and journal.get(running.id, ME) is None


def test_a_restart_keeps_all_and_queues_what_ran(opened):
    journal = opened()
    first, second, third = accept(journal, inputs=PICTURE), accept(journal), accept(journal, owner=OTHER)
    finished = done(journal)
    assert journal.started(second.id) and journal.started(first.id)
    journal = opened()
    assert journal.unfinished() == [replace(first, attempts=1), replace(second, attempts=1), third]
    assert journal.file(first.id, ME, "reference.png").read_bytes() == b"a picture"
    assert journal.file(finished, ME, "video.mp4").read_bytes() == b"film"


def test_what_is_on_the_disk_before_a_job_is_acknowledged(opened, monkeypatch):
    journal, events = opened(), []

    def noted(owner, name, of):
        call = getattr(owner, name)

        def instead(*arguments):
            events.append((name, of(*arguments)))
            return call(*arguments)

        monkeypatch.setattr(owner, name, instead)

    noted(os, "fsync", lambda handle: Path(os.readlink(f"/proc/self/fd/{handle}")).name)
    noted(Path, "replace", lambda path, target: target.name)
    noted(infer.journal, "insert", lambda database, record, size: record.id)
    noted(Journal, "_changed", lambda journal, change, *values: values[-1])
    assert journal._database.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL: a commit is on the disk
    record = accept(journal, inputs=PICTURE)
    written = [("fsync", "reference.png"), ("replace", "reference.png"), ("fsync", record.id), ("fsync", "jobs")]
    assert events == [*written, ("insert", record.id)]
    events.clear()
    journal.completed(record.id, {}, {"video.mp4": b"film"})
    assert events == [
        *[(event, name.replace("reference.png", "video.mp4")) for event, name in written],
        ("_changed", record.id),
    ]


def test_nobody_sees_what_another_owns(opened):
    journal = opened()
    id = done(journal)
    for owner in (OTHER, "", ME.upper(), "%"):
        assert journal.get(id, owner) is None and journal.file(id, owner, "video.mp4") is None
        assert not journal.deleted(id, owner) and journal.page(owner, "video") == ([], False)
        assert journal.page(owner, "video", after=id) == ([], False)
    nobodys = done(journal, owner="")
    assert journal.get(nobodys, "").owner == "" and journal.get(nobodys, ME) is None
    assert journal.deleted(id, ME) and journal.get(id, ME) is None and lying(journal, id) == {}


def test_pages(opened):
    journal = opened()
    ids = []
    for _ in range(5):
        ids.append(accept(journal).id)
        accept(journal, owner=OTHER)
        accept(journal, kind="image")

    def page(**options):
        records, more = journal.page(ME, "video", **options)
        return [ids.index(record.id) for record in records], more

    assert page() == ([4, 3, 2, 1, 0], False) and page(limit=5) == ([4, 3, 2, 1, 0], False)
    assert page(limit=2) == ([4, 3], True) and page(limit=2, after=ids[3]) == ([2, 1], True)
    assert page(limit=2, after=ids[1]) == ([0], False) and page(after=ids[0]) == ([], False)
    assert page(limit=3, newest_first=False) == ([0, 1, 2], True)
    assert page(limit=3, newest_first=False, after=ids[2]) == ([3, 4], False)
    with pytest.raises(UserError, match=r"^there is no job 'video_0' .* expected the id of one from this list$"):
        page(after="video_0")


def test_pages_go_on_where_a_job_is_gone(opened, clock):
    journal, ids = opened(), []
    for _ in range(5):
        ids.append(accept(journal).id)
        clock.now += 0.002
    journal.deleted(ids[2], ME)
    for newest_first, left in ((True, [1, 0]), (False, [3, 4])):
        records, more = journal.page(ME, "video", after=ids[2], newest_first=newest_first)
        assert [ids.index(record.id) for record in records] == left and not more


def test_jobs_are_swept_when_their_life_is_over(opened, clock):
    journal = opened()
    old, waiting = done(journal), accept(journal, inputs=PICTURE)
    clock.now += 30
    young = done(journal)
    assert journal.failed(accept(journal).id, "a", "b")
    assert journal.sweep() == []
    clock.now += 30
    assert journal.sweep() == [old] and journal.get(old, ME) is None and lying(journal, old) == {}
    assert journal.get(young, ME) and journal.get(waiting.id, ME) and lying(journal, waiting.id) == PICTURE
    clock.now += 1000
    assert len(journal.sweep()) == 2 and journal.unfinished() == [waiting]


def test_the_oldest_results_are_swept_until_the_files_fit(opened, clock):
    journal = opened(quota_bytes=1000)
    first, second = accept(journal), accept(journal)
    for record in (second, first):  # the second ends first
        clock.now += 1
        assert journal.completed(record.id, {}, {"video.mp4": bytes(400)})
    assert journal.failed(accept(journal).id, "a", "b")
    assert journal.sweep() == []
    waiting = accept(journal, inputs={"reference.png": bytes(400)})
    assert journal.sweep() == [second.id]
    assert journal.get(first.id, ME) and journal.get(waiting.id, ME)
    accept(journal, inputs={"reference.png": bytes(2000)})
    assert journal.sweep() == [first.id] and len(journal.unfinished()) == 2


NOT_NAMES = ["../a.png", "a/b.png", "/etc/x.png", "..", "", "a", ".a.png", "A.png", "a.png\n", "a\0.png"]


@pytest.mark.parametrize("name", NOT_NAMES)
def test_names_that_are_no_file_names_stay_out(opened, tmp_path, name):
    journal = opened()
    with pytest.raises(ValueError, match="no names for files of a job"):
        accept(journal, inputs={name: b"x"})
    id = done(journal)
    with pytest.raises(ValueError, match="no names for files of a job"):
        journal.completed(accept(journal).id, {}, {name: b"x"})
    assert journal.file(id, ME, name) is None and len(journal.unfinished()) == 1
    assert not any(journal._partial.iterdir())


@pytest.mark.parametrize("id", ["../..", "", "video_", "video_" + "0" * 31 + "/", "video_" + "0" * 32 + "\n", "/", "."])
def test_ids_that_are_no_ids_stay_out(opened, tmp_path, id):
    journal = opened()
    done(journal)
    before = sorted(tmp_path.rglob("*"))
    assert journal.get(id, ME) is None and journal.file(id, ME, "video.mp4") is None
    assert not journal.deleted(id, ME) and not journal.failed(id, "a", "b") and not journal.started(id)
    with pytest.raises(ValueError, match="is no job's id"):
        journal.completed(id, {}, {"video.mp4": b"film"})
    assert sorted(tmp_path.rglob("*")) == before


def test_a_result_never_takes_the_place_of_an_input(opened):
    journal = opened()
    record = accept(journal, inputs=PICTURE)
    with pytest.raises(ValueError, match="named like what came with the job"):
        journal.completed(record.id, {}, {"reference.png": b"b"})
    assert lying(journal, record.id) == PICTURE


def test_opening_clears_what_no_row_knows_and_nothing_else(opened):
    journal = opened()
    id, waiting = done(journal), accept(journal, inputs=PICTURE)
    orphan = journal._jobs / f"video_{'0' * 32}"
    (journal._partial / orphan.name).mkdir()
    for path in (orphan, journal._jobs / "mine", journal._jobs / waiting.id):
        path.mkdir(exist_ok=True)
        (path / "video.mp4").write_bytes(b"half")
    journal = opened()
    assert not orphan.exists() and not any(journal._partial.iterdir())
    assert lying(journal, id) == {"video.mp4": b"film"} and lying(journal, waiting.id) == PICTURE
    assert lying(journal, "mine") == {"video.mp4": b"half"}


def test_a_full_disk_takes_nothing_on(opened, monkeypatch):
    journal = opened()
    record = accept(journal, inputs=PICTURE)

    def full(*_):
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(infer.journal, "insert", full)
        with pytest.raises(sqlite3.OperationalError):
            accept(journal, inputs=PICTURE)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(sqlite3.OperationalError):
            journal.completed(record.id, {}, {"video.mp4": b"film"})
    assert journal.unfinished() == [record] and [path.name for path in journal._jobs.iterdir()] == [record.id]
    assert journal.completed(record.id, {}, {"video.mp4": b"film"})


def test_what_is_put_back_was_never_begun(opened):
    journal = opened()
    record = accept(journal)
    assert not journal.put_back(record.id)
    assert journal.started(record.id) and journal.get(record.id, ME).attempts == 1
    assert journal.put_back(record.id) and journal.get(record.id, ME) == record
    ended = done(journal)
    assert not journal.put_back(ended) and journal.get(ended, ME).status == "completed"


def test_a_journal_of_the_version_before_is_taken_over(opened, tmp_path):
    journal = opened()
    record, ended = accept(journal, inputs=PICTURE), done(journal)
    journal.close()
    with closing(sqlite3.connect(tmp_path / "jobs" / "journal.sqlite")) as database:
        database.executescript("ALTER TABLE jobs DROP COLUMN attempts; PRAGMA user_version = 1;")
    for _ in range(2):
        journal = opened()
        assert journal.unfinished() == [record] and lying(journal, ended) == {"video.mp4": b"film"}
    assert journal.started(record.id) and journal.get(record.id, ME).attempts == 1


def refused(folder, *words):
    with pytest.raises(UserError) as error:
        Journal(folder, quota_bytes=1, lifetime_seconds=1)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_foreign_databases_are_refused_and_left_alone(tmp_path):
    file = tmp_path / "journal.sqlite"
    with sqlite3.connect(file) as database:
        database.execute("CREATE TABLE recipes (name TEXT)")
    database.close()
    before = file.read_bytes()
    refused(tmp_path, str(file), "another program or version", "name another folder")
    assert file.read_bytes() == before
    with sqlite3.connect(file) as database:
        database.execute(f"PRAGMA application_id = {APPLICATION}")
        database.execute("PRAGMA user_version = 99")
    database.close()
    refused(tmp_path, "another program or version")
    file.write_text("this is a diary, and no database at all, though it is long enough to be one" * 100)
    refused(tmp_path, "file is not a database")
    file.unlink()
    Journal(tmp_path, quota_bytes=1, lifetime_seconds=1).close()  # the lock was let go of each time


def test_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "cannot keep jobs", "name another")
    refused(tmp_path / "file" / "below", "cannot keep jobs", "name another")
    (tmp_path / "odd" / "journal.sqlite").mkdir(parents=True)
    refused(tmp_path / "odd", "unable to open database file")


def test_a_damaged_database_opens_or_is_refused(opened, tmp_path):
    journal = opened()
    for _ in range(20):
        done(journal)
        accept(journal)
    journal.close()
    file, chance = tmp_path / "jobs" / "journal.sqlite", random.Random(0)
    sound, refusals = file.read_bytes(), []
    for number in range(60):
        damaged = bytearray(sound)
        if number % 3 == 0:
            del damaged[chance.randrange(1, len(sound)) :]
        for _ in range(number):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        file.write_bytes(damaged)
        try:
            Journal(tmp_path / "jobs", quota_bytes=1, lifetime_seconds=1).close()
        except UserError as error:
            refusals.append(str(error))
        for left in tmp_path.glob("jobs/journal.sqlite-*"):
            left.unlink()
    assert len(refusals) > 30
    assert all("cannot use the journal" in refusal and "\n" not in refusal for refusal in refusals)


def test_threads(opened):
    journal, errors = opened(quota_bytes=10**9), []

    def work(owner):
        try:
            for number in range(10):
                id = done(journal, owner=owner, inputs=PICTURE, files={"video.mp4": f"{owner} {number}".encode()})
                assert journal.file(id, owner, "video.mp4").read_bytes() == f"{owner} {number}".encode()
                assert len(journal.page(owner, "video", limit=100)[0]) == number + 1
                assert all(record.owner != owner for record in journal.unfinished())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=[f"{number}" * 64]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and journal.unfinished() == []
