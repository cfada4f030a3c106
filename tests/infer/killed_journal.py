"""Run by test_journal_kills.py: takes on jobs and ends them, and says what is acknowledged, until it is killed.

killed_journal.py FOLDER             for ever, in two threads
killed_journal.py FOLDER STEPWISE    one round after the other, each killed one change to the folder later, and checked;
                                     prints how often it was killed
"""

import hashlib
import os
import random
import shutil
import signal
import sys
import threading
from pathlib import Path

from infer import journal as module
from infer.journal import Journal

OWNER, FOREVER = "0f" * 32, 1e12


def opened(folder, **options):
    return Journal(folder, **{"quota_bytes": 10**12, "lifetime_seconds": FOREVER} | options)


def hashes(files):
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def say(verb, id):
    os.write(1, f"{verb} {id}\n".encode())


def finish(journal, record, chance):
    """Runs a job to one of its ends."""
    assert journal.started(record.id)
    if chance.random() < 0.1:
        assert journal.failed(record.id, "bad_luck", "it was not to be")
        return say("failed", record.id)
    files = {"video.mp4": chance.randbytes(chance.randrange(300_000)), "last.png": chance.randbytes(1000)}
    assert journal.completed(record.id, hashes(files), files)
    return say("completed", record.id)


def round_of(journal, chance, *fates):
    """One job for each fate."""
    for fate in fates:
        files = {"reference.png": chance.randbytes(chance.randrange(100_000))}
        inputs = files if chance.random() < 0.8 else {}
        record = journal.accept(kind="video", model="demo", owner=OWNER, request=hashes(files), inputs=inputs)
        say("accepted", record.id)
        if "ends" in fate:
            finish(journal, record, chance)
        if "deleted" in fate:
            say("deleting", record.id)
            assert journal.deleted(record.id, OWNER)
            say("deleted", record.id)


def for_ever(folder):
    journal = opened(folder)
    for record in journal.unfinished():
        finish(journal, record, random.Random())

    def work():
        chance = random.Random()
        while True:
            round_of(journal, chance, "ends", "deleted", "ends and is deleted", "waits")

    other = threading.Thread(target=work, daemon=True)
    other.start()
    work()


def check(folder, said):
    """What was acknowledged is there, what is there is whole, and nothing else lies about; returns how many jobs."""
    with opened(folder) as journal:
        for id, verb in said.items():
            record = journal.get(id, OWNER)
            assert (record is not None) or verb in ("deleting", "deleted"), f"{verb} {id} is lost"
            assert record is None or verb != "deleted", f"{id} is back"
            assert verb not in ("completed", "failed") or record.status == verb
        records, more = journal.page(OWNER, "video", limit=10**6)
        assert not more
        lying = {}
        for record in records:
            names = {*record.inputs, *record.files}
            known = record.result if record.status == "completed" else record.request
            found = {name: journal.file(record.id, OWNER, name).read_bytes() for name in names}
            assert all(hashes(found)[name] == known[name] for name in names), f"{record.id} is half-written"
            assert record.status != "completed" or set(known) == names
            assert record.status != "in_progress"
            if names:
                lying[record.id] = names
        for room in folder.joinpath("jobs").iterdir():
            files = {file.name for file in room.iterdir()}
            assert files == lying.pop(room.name, set()), room
        assert not lying
        assert not any(folder.joinpath("partial").iterdir())
        return len(records)


def heard(output, said):
    """Adds what was said by now (a line that the kill has torn does not count)."""
    for line in output.rpartition("\n")[0].splitlines():
        verb, id = line.split()
        said[id] = verb


def kill_before(count):
    """Kills this process before the count-th call that changes the folder, with a write torn in two."""
    left = [count]

    def counted(owner, name):
        call = getattr(owner, name)

        def instead(*arguments, **options):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        setattr(owner, name, instead)

    for owner, names in (
        (Path, ("mkdir", "replace", "unlink")),
        (module.os, ("fsync",)),
        (module.shutil, ("rmtree",)),
        (module, ("insert", "open_database")),
        (Journal, ("_changed", "_remove", "_tidy")),
    ):
        for name in names:
            counted(owner, name)


def stepwise(folder):
    kills, said = 0, {}
    module.os.fsync = lambda handle: None  # a killed process leaves what it wrote to the system, fsync or not
    while True:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.dup2(writer, 1)
            kill_before(kills + 1)
            chance = random.Random(kills)
            with opened(folder) as journal:
                round_of(journal, chance, "ends", "deleted")
            with opened(folder, clock=lambda: 2 * FOREVER) as journal:
                for record in journal.page(OWNER, "video", limit=100)[0]:
                    if record.ended:
                        say("deleting", record.id)
                journal.sweep()
            os._exit(0)
        os.close(writer)
        with open(reader) as output:
            heard(output.read(), said)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 0:
            break
        assert code == -signal.SIGKILL, code
        kills += 1
        check(folder, said)
        if kills % 20 == 0:
            shutil.rmtree(folder)
            said = {}
    print(kills)


if __name__ == "__main__":
    if sys.argv[2:]:
        stepwise(Path(sys.argv[1]))
    else:
        for_ever(Path(sys.argv[1]))
