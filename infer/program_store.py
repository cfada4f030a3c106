"""Compiled programs in a folder, so that the next process has nothing to compile.

Loading one runs code that the file holds: a folder or a file that someone else could have written is refused. Whatever
else is wrong with a file costs a line in the log, and the program is compiled again.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pickle
import stat
import struct
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental.serialize_executable import deserialize_and_load, serialize

LOG = logging.getLogger(__name__)

PROGRAM, CALL, UNFINISHED = ".program", ".call", ".unfinished"
COMPILED = "/jax/core/compile/backend_compile_duration"
FROM_CACHE = "/jax/compilation_cache/cache_hits"
ABANDONED = 3600  # seconds after which a file is never finished
MAGIC = b"dit-jax program\n"
HEADER = struct.Struct(f"<{len(MAGIC)}s32sQ32s")  # magic, key, bytes of the content, its sha256


_HERE = threading.local()  # events of the compilation that goes on in this thread


class Lowered(NamedTuple):
    """What a call was lowered to: the program's key, and the structure of what it gives."""

    key: str
    out_tree: Any


class ProgramStore:
    """Programs under keys (sha256 in hex) in a folder of this user, which is made if need be.

    limit_bytes  of all files together; those unused for longest go first
    A folder that cannot be used is said in the log: then nothing is found and nothing kept.
    """

    def __init__(self, folder: str | Path, *, limit_bytes: int):
        self._folder, self._limit = Path(folder), limit_bytes
        self._lock = threading.Lock()
        self._usable = self._made()

    def load(self, key: str, in_tree: Any, out_tree: Any, devices: Sequence[jax.Device]) -> jax.stages.Compiled | None:
        """The program of this key, for these devices; None where there is none that can be used.

        in_tree   structure of (positional arguments, keyword arguments)
        out_tree  structure of what it gives
        """
        content = self._read(key, PROGRAM)
        if content is None:
            return None
        try:
            return deserialize_and_load(content, in_tree, out_tree, devices[0].client, devices)
        except Exception as error:  # whatever the compiler's reader raises
            LOG.warning("%s is ignored: it cannot be loaded: %s", self._path(key, PROGRAM), error)
            return None

    def save(self, key: str, compiled: jax.stages.Compiled, devices: Sequence[jax.Device]) -> bool:
        """Keeps a program that was `compiled_now` for these devices; whether it could be."""
        try:
            runtime: Any = compiled.runtime_executable()
            found = [device.id for device in runtime.local_devices()]
            if found != [device.id for device in devices]:
                raise ValueError(f"it is for devices {found}, not for those of its arguments")
            content, _, _ = serialize(compiled)
        except Exception as error:  # of many kinds, by what the program holds
            LOG.warning("a compiled program is not kept: %s", error)
            return False
        return self._write(key, PROGRAM, content)

    def recall(self, call: str) -> Lowered | None:
        """What a call was lowered to, where that is known."""
        content = self._read(call, CALL)
        if content is None:
            return None
        try:
            return Lowered(*pickle.loads(content))
        except Exception as error:  # classes of the structure may be gone
            LOG.warning("%s is ignored: it cannot be read: %s", self._path(call, CALL), error)
            return None

    def remember(self, call: str, lowered: Lowered) -> None:
        """Keeps what a call was lowered to."""
        try:
            content = pickle.dumps(tuple(lowered))
        except Exception as error:  # classes of the structure may be local
            LOG.info("what a call is lowered to is not kept: %s", error)
            return
        self._write(call, CALL, content)

    def _made(self) -> bool:
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_owned(self._folder.stat())
        except OSError as error:
            LOG.warning("compiled programs are not kept in %s: %s", self._folder, error)
            return False
        return True

    def _path(self, key: str, kind: str) -> Path:
        return self._folder / (key + kind)

    def _read(self, key: str, kind: str) -> bytes | None:
        path = self._path(key, kind)
        if not self._usable:
            return None
        try:
            with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
                _check_owned(os.fstat(file.fileno()))
                magic, named, length, digest = HEADER.unpack(file.read(HEADER.size))
                content = file.read()
            if (magic, named) != (MAGIC, bytes.fromhex(key)):
                raise ValueError("it is not what its name says")
            if (length, digest) != (len(content), hashlib.sha256(content).digest()):
                raise ValueError("it is damaged")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, struct.error) as error:
            LOG.warning("%s is ignored: %s", path, error)
            return None
        with contextlib.suppress(OSError):  # what is only read is not trimmed either
            os.utime(path)
        return content

    def _write(self, key: str, kind: str, content: bytes) -> bool:
        """Keeps a file, whole or not at all."""
        if not self._usable:
            return False
        if HEADER.size + len(content) > self._limit:
            LOG.warning("a compiled program of %d bytes is not kept: the limit is %d bytes", len(content), self._limit)
            return False
        header = HEADER.pack(MAGIC, bytes.fromhex(key), len(content), hashlib.sha256(content).digest())
        try:
            with tempfile.NamedTemporaryFile(dir=self._folder, suffix=UNFINISHED, delete=False) as file:
                try:
                    file.write(header + content)
                    file.flush()
                    os.fsync(file.fileno())
                    os.replace(file.name, self._path(key, kind))
                except BaseException:
                    os.unlink(file.name)
                    raise
            self._trim()
        except OSError as error:
            LOG.warning("a compiled program is not kept: %s", error)
            return False
        return True

    def _trim(self) -> None:
        """Removes what was unused for longest until the rest is within the limit, and what was never finished."""
        with self._lock:
            found = []
            for path in self._folder.iterdir():
                with contextlib.suppress(FileNotFoundError):  # another process trims too
                    about = path.stat()
                    found.append((about.st_mtime, about.st_size, path))
            total = sum(size for _, size, _ in found)
            for used, size, path in sorted(found):
                abandoned = path.suffix == UNFINISHED and used < time.time() - ABANDONED
                if abandoned or (total > self._limit and path.suffix in (PROGRAM, CALL)):
                    path.unlink(missing_ok=True)
                    total -= size


def compiled_now(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, bool]:
    """The compiled program, and whether the compiler made it now.

    One that comes out of a cache of jax may have been loaded there. It cannot be kept: what the CPU's compiler writes
    of a program that it did not make can be loaded, and fails when it runs.
    """
    _HERE.events = []
    compiled = lowered.compile()
    new = COMPILED in _HERE.events and FROM_CACHE not in _HERE.events
    if not new:
        LOG.info("a compiled program is not kept: it comes out of a cache of jax")
    return compiled, new


def _listen(event: str, *_: Any, **__: Any) -> None:
    if event in (COMPILED, FROM_CACHE):
        _HERE.__dict__.setdefault("events", []).append(event)


jax.monitoring.register_event_listener(_listen)
jax.monitoring.register_event_duration_secs_listener(_listen)


def _check_owned(about: os.stat_result) -> None:
    """PermissionError for what others may have written."""
    if not (stat.S_ISREG(about.st_mode) or stat.S_ISDIR(about.st_mode)):
        raise PermissionError("it is neither a file nor a folder")
    if about.st_uid != os.geteuid():
        raise PermissionError(f"it belongs to user {about.st_uid}: expected it to be of this user, {os.geteuid()}")
    if about.st_mode & 0o022:
        raise PermissionError("others may write to it: expected it to be this user's alone; run chmod go-w on it")
