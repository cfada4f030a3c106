"""Locks between processes: advisory, on files, gone with the process that holds them."""

from __future__ import annotations

import fcntl
import os
import weakref
from pathlib import Path


class FileLock:
    """A lock on a file, held until `release`, the end of a `with` block, or until nobody refers to it any more.

    shared  several may hold it at once, as long as nobody holds it alone
    wait    for others to release it; otherwise BlockingIOError where they have not
    Raises OSError when the file cannot be made.
    """

    def __init__(self, file: Path, *, shared: bool = False, wait: bool = True):
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self.release = weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BaseException:
            self.release()
            raise

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, *_) -> None:
        self.release()
