"""What a job is, and the SQLite table that keeps jobs."""

from __future__ import annotations

import json
import re
import sqlite3
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

Kind = Literal["image", "video"]
Status = Literal["queued", "in_progress", "completed", "failed"]

ID = re.compile(r"(?:image|video)_[0-9a-f]{32}")
FILE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}\.[a-z0-9]{1,8}")

APPLICATION, VERSION = 0x6469746A, 2  # "ditj", and the number of this schema
ATTEMPTS = "attempts INTEGER NOT NULL DEFAULT 0"
SCHEMA = f"""
CREATE TABLE jobs (
    place INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, model TEXT NOT NULL, owner TEXT NOT NULL, request TEXT NOT NULL,
    inputs TEXT NOT NULL, status TEXT NOT NULL, created REAL NOT NULL, started REAL, ended REAL, expires REAL,
    error TEXT NOT NULL, result TEXT NOT NULL, files TEXT NOT NULL, size INTEGER NOT NULL,
    {ATTEMPTS}
);
CREATE INDEX owners ON jobs (owner, kind, place);
"""


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """A job as the journal knows it.

    owner    hash of the API key that it came with; "" for none
    inputs   names of the files that came with it; none once it has ended
    created, started, ended, expires  seconds since 1970
    error    {"code", "message"} of a failed job
    result   what is known of a completed one besides its files
    files    names of its results
    attempts  how often it was begun and neither ended nor put back
    """

    id: str
    kind: Kind
    model: str
    owner: str
    request: dict[str, Any]
    inputs: tuple[str, ...] = ()
    status: Status = "queued"
    created: float
    started: float | None = None
    ended: float | None = None
    expires: float | None = None
    error: dict[str, str] | None = None
    result: dict[str, Any] | None = None
    files: tuple[str, ...] = ()
    attempts: int = 0


COLUMNS = tuple(field.name for field in fields(JobRecord))
IN_JSON = {"request", "inputs", "error", "result", "files"}


def open_database(file: Path) -> sqlite3.Connection:
    """The database, made where there is none, brought up to this version where it is of the one before; ValueError or
    sqlite3.Error for one that is foreign or damaged."""
    database = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
    try:
        names = ("application_id", "user_version")
        signature = tuple(database.execute(f"PRAGMA {name}").fetchone()[0] for name in names)
        empty = database.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
        if not empty and signature not in ((APPLICATION, VERSION), (APPLICATION, VERSION - 1)):
            raise ValueError("it belongs to another program or version")
        (found,) = database.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise ValueError(" ".join(found.split()))
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        signed = f"PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {VERSION};"
        if empty:
            database.executescript(f"BEGIN; {signed} {SCHEMA} COMMIT;")
        elif signature[1] < VERSION:
            database.executescript(f"BEGIN; {signed} ALTER TABLE jobs ADD COLUMN {ATTEMPTS}; COMMIT;")
    except BaseException:
        database.close()
        raise
    return database


def insert(database: sqlite3.Connection, record: JobRecord, size: int) -> None:
    """Adds the row of a job whose files take `size` bytes."""
    values = [json.dumps(getattr(record, name)) if name in IN_JSON else getattr(record, name) for name in COLUMNS]
    columns, marks = ", ".join(COLUMNS), ", ".join("?" * len(COLUMNS))
    database.execute(f"INSERT INTO jobs ({columns}, size) VALUES ({marks}, ?)", [*values, size])


def select(database: sqlite3.Connection, rest: str, *values: Any) -> list[JobRecord]:
    """The jobs that the rest of a SELECT finds; ValueError or TypeError for a row that `insert` cannot have written."""
    rows = database.execute(f"SELECT {', '.join(COLUMNS)} FROM jobs {rest}", values).fetchall()
    return [_record(dict(zip(COLUMNS, row, strict=True))) for row in rows]


def _record(values: dict[str, Any]) -> JobRecord:
    values |= {name: json.loads(values[name]) for name in IN_JSON}
    values |= {name: tuple(values[name]) for name in ("inputs", "files")}
    record = JobRecord(**values)
    sound = (
        ID.fullmatch(record.id)
        and record.kind in get_args(Kind)
        and record.status in get_args(Status)
        and isinstance(record.request, dict)
        and isinstance(record.attempts, int)
        and all(FILE_NAME.fullmatch(name) for name in record.inputs + record.files)
    )
    if not sound:
        raise ValueError(f"its job {record.id!r} is damaged")
    return record
