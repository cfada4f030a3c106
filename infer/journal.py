"""Jobs that survive a restart: one folder with a SQLite journal and the files of each job.

    FOLDER/journal.sqlite   one row a job
    FOLDER/jobs/ID/         what came with a job until it ends, then its results
    FOLDER/partial/ID/      files on their way there
    FOLDER/lock             held by the one process that the folder belongs to

A row is committed after the files that it names are whole and on the disk, and leaves before they do. Whenever the
process dies there may be files too many, which the next opening removes, but never one too few or half of one.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from convert.safetensors_files import flush
from dit_jax.config import UserError
from infer.job_records import FILE_NAME, ID, JobRecord, Kind, insert, open_database, select


class Journal:
    """The jobs of one server, for any of its threads; UserError for a folder that cannot be used.

    quota_bytes       how much the files of all jobs may take
    lifetime_seconds  how long a job that has ended is kept
    Opening queues again what was running when the last process ended. OSError and sqlite3.Error of a disk that fails or
    is full are passed on, and what was asked for has then not happened.
    """

    def __init__(
        self, folder: Path | str, *, quota_bytes: int, lifetime_seconds: float, clock: Callable[[], float] = time.time
    ):
        folder = Path(folder)
        self.quota_bytes, self.lifetime_seconds, self._clock = quota_bytes, lifetime_seconds, clock
        self._jobs, self._partial = folder / "jobs", folder / "partial"
        self._turn = threading.Lock()
        file = folder / "journal.sqlite"
        with ExitStack() as opened:
            opened.callback(os.close, _own(folder, (self._jobs, self._partial)))
            try:
                self._database = opened.enter_context(closing(open_database(file)))
                self._tidy()
            except (sqlite3.Error, ValueError, TypeError) as error:
                raise UserError(
                    f"cannot use the journal {str(file)!r} ({error}): expected one that this version wrote; name "
                    "another folder, or move the file away and begin without its jobs"
                ) from error
            flush(folder)
            self._opened = opened.pop_all()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the folder."""
        with self._turn:
            self._opened.close()

    def accept(
        self, *, kind: Kind, model: str, owner: str, request: dict[str, Any], inputs: Mapping[str, bytes] | None = None
    ) -> JobRecord:
        """A new job in the queue, which no crash can lose any more."""
        inputs, now = inputs or {}, self._clock()
        record = JobRecord(
            id=f"{kind}_{int(1000 * now):012x}{secrets.token_hex(10)}",
            kind=kind,
            model=model,
            owner=owner,
            request=request,
            inputs=tuple(inputs),
            created=now,
        )
        with self._written(record.id, inputs) as written, self._turn:
            try:
                self._put(record.id, written, inputs)
                insert(self._database, record, _size(inputs))
            except BaseException:
                self._remove(record.id)
                raise
        return record

    def started(self, id: str) -> bool:
        """A queued job runs; False where it is not queued any more."""
        with self._turn:
            change = "status = 'in_progress', started = ?, attempts = attempts + 1 WHERE id = ? AND status = 'queued'"
            return self._changed(change, self._clock(), id)

    def put_back(self, id: str) -> bool:
        """A job that runs is queued again, as if it had never begun; False where it does not run."""
        with self._turn:
            change = (
                "status = 'queued', started = NULL, attempts = attempts - 1 WHERE id = ? AND status = 'in_progress'"
            )
            return self._changed(change, id)

    def completed(self, id: str, result: dict[str, Any], files: Mapping[str, bytes]) -> bool:
        """A job is done and its files can be had; False, and nothing is kept, where it has ended or was deleted."""
        change = (
            "status = 'completed', result = ?, inputs = '[]', files = ?, size = ?, ended = ?, expires = ? WHERE id = ?"
        )
        now = self._clock()
        values = (json.dumps(result), json.dumps(list(files)), _size(files), now, now + self.lifetime_seconds, id)
        with self._written(id, files) as written, self._turn:
            running = select(self._database, "WHERE id = ? AND ended IS NULL", id)
            if not running:
                return False
            inputs = running[0].inputs
            if clash := set(inputs) & set(files):
                raise ValueError(f"results named like what came with the job: {sorted(clash)}")
            self._put(id, written, files)
            self._changed(change, *values)
            for name in inputs:
                (self._folder(id) / name).unlink(missing_ok=True)
            return True

    def failed(self, id: str, code: str, message: str) -> bool:
        """A job will not be done, for this reason; False where it has ended or was deleted."""
        change = (
            "status = 'failed', error = ?, inputs = '[]', size = 0, ended = ?, expires = ? "
            "WHERE id = ? AND ended IS NULL"
        )
        error, now = json.dumps({"code": code, "message": message}), self._clock()
        with self._turn:
            changed = self._changed(change, error, now, now + self.lifetime_seconds, id)
            if changed:
                self._remove(id)
        return changed

    def deleted(self, id: str, owner: str) -> bool:
        """A job is forgotten with its files, even one that runs; False where the owner has none of that id."""
        with self._turn:
            gone = self._database.execute("DELETE FROM jobs WHERE id = ? AND owner = ?", (id, owner)).rowcount > 0
            if gone:
                self._remove(id)
        return gone

    def get(self, id: str, owner: str) -> JobRecord | None:
        """The owner's job of that id."""
        with self._turn:
            found = select(self._database, "WHERE id = ? AND owner = ?", id, owner)
        return found[0] if found else None

    def page(
        self, owner: str, kind: Kind, *, after: str | None = None, limit: int = 20, newest_first: bool = True
    ) -> tuple[list[JobRecord], bool]:
        """Up to `limit` (at least 1) of the owner's jobs that follow the job `after`, and whether there are more.

        Where that job is gone, the time in its id says where to go on. UserError for what is no id.
        """
        where, values = "WHERE owner = ? AND kind = ?", list[Any]((owner, kind))
        sign, order = ("<", "DESC") if newest_first else (">", "ASC")
        if after is not None and not ID.fullmatch(after):
            raise UserError(f"there is no job {after!r} to go on after: expected the id of one from this list")
        with self._turn:
            if after is not None:
                found = self._database.execute("SELECT place FROM jobs WHERE id = ? AND owner = ?", (after, owner))
                place = found.fetchone()
                column, bound = ("place", place[0]) if place else ("created", _moment(after, newest_first))
                where, values = f"{where} AND {column} {sign} ?", [*values, bound]
            records = select(self._database, f"{where} ORDER BY place {order} LIMIT ?", *values, limit + 1)
        return records[:limit], len(records) > limit

    def unfinished(self) -> list[JobRecord]:
        """What is queued or runs, in the order in which it was accepted."""
        with self._turn:
            return select(self._database, "WHERE ended IS NULL ORDER BY place")

    def file(self, id: str, owner: str, name: str) -> Path | None:
        """Where a file of the owner's job lies, until somebody deletes it; None where there is no such job or file."""
        record = self.get(id, owner)
        known = record is not None and name in record.inputs + record.files
        return self._folder(id) / name if known else None

    def sweep(self) -> list[str]:
        """Forgets jobs past their lifetime, then the oldest that have ended until all files fit the quota; their ids.

        Jobs that have not ended stay, whatever they take.
        """
        now, kept = self._clock(), "FROM jobs WHERE (expires IS NULL OR expires > ?)"
        with self._turn:
            gone = [id for (id,) in self._database.execute("SELECT id FROM jobs WHERE expires <= ?", (now,))]
            (taken,) = self._database.execute(f"SELECT total(size) {kept}", (now,)).fetchone()
            oldest = f"SELECT id, size {kept} AND ended IS NOT NULL AND size > 0 ORDER BY ended, place"
            for id, size in self._database.execute(oldest, (now,)):
                if taken <= self.quota_bytes:
                    break
                gone.append(id)
                taken -= size
            self._database.execute("DELETE FROM jobs WHERE id IN (SELECT value FROM json_each(?))", (json.dumps(gone),))
            for id in gone:
                self._remove(id)
        return gone

    def _tidy(self) -> None:
        known = {record.id: {*record.inputs, *record.files} for record in select(self._database, "")}
        for folder in (*self._jobs.iterdir(), *self._partial.iterdir()):
            if folder.parent == self._jobs and folder.name in known:
                for file in folder.iterdir():
                    if file.name not in known[folder.name]:
                        file.unlink()
            elif ID.fullmatch(folder.name):
                shutil.rmtree(folder, ignore_errors=True)
        self._changed("status = 'queued', started = NULL WHERE status = 'in_progress'")

    def _changed(self, change: str, *values: Any) -> bool:
        return self._database.execute(f"UPDATE jobs SET {change}", values).rowcount > 0

    def _folder(self, id: str) -> Path:
        if not ID.fullmatch(id):
            raise ValueError(f"{id!r} is no job's id")
        return self._jobs / id

    @contextmanager
    def _written(self, id: str, files: Mapping[str, bytes]) -> Iterator[Path]:
        """A folder with the files, whole and on the disk, to be moved to the job's own; in the end it goes."""
        if wrong := [name for name in files if not FILE_NAME.fullmatch(name)]:
            raise ValueError(f"no names for files of a job: {wrong}")
        folder = self._partial / self._folder(id).name
        folder.mkdir()
        try:
            for name, content in files.items():
                with (folder / name).open("xb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _put(self, id: str, written: Path, names: Mapping[str, bytes]) -> None:
        if names:
            folder = self._folder(id)
            folder.mkdir(exist_ok=True)
            for name in names:
                (written / name).replace(folder / name)
            flush(folder)
            flush(self._jobs)

    def _remove(self, id: str) -> None:
        shutil.rmtree(self._folder(id), ignore_errors=True)


def _own(folder: Path, rooms: tuple[Path, ...]) -> int:
    """Makes the folder and takes its lock; the descriptor that holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for room in rooms:
            room.mkdir(exist_ok=True, mode=0o700)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise UserError(
            f"cannot keep jobs in {str(folder)!r} ({error.strerror or error}): expected a folder that can be written "
            "to; name another"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise UserError(
            f"the jobs in {str(folder)!r} belong to a server that is running: expected one server to a folder; stop it "
            "or name another folder"
        ) from error
    return lock


def _moment(id: str, newest_first: bool) -> float:
    """Seconds since 1970 beside the millisecond in which an id was given; those of the same one are on the far side."""
    return (int(id.partition("_")[2][:12], 16) + (1 if newest_first else -0.5)) / 1000


def _size(files: Mapping[str, bytes]) -> int:
    return sum(map(len, files.values()))
