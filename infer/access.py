"""Who may ask: API keys, and how much each may ask for."""

from __future__ import annotations

import hashlib
import hmac
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dit_jax.config import UserError

LOCAL = re.compile(r"(localhost|127(\.\d+){3}|\[::1\])(:\d+)?", re.IGNORECASE)
NOBODY = ""  # the owner of all where no keys are asked for


class RateLimitError(Exception):
    """A key has asked too often; it may again in `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True, kw_only=True)
class KeyLimits:
    """What one key may ask for: requests that make something, a minute. None: as many as it likes."""

    per_minute: int | None = None


class Access:
    """Keys from a file, one a line (`#` begins a remark); without one, everybody is the same owner.

    Keys are kept as their SHA-256 and compared in constant time. UserError for a file that cannot be read or is empty.
    """

    def __init__(self, file: Path | None, limits: KeyLimits = KeyLimits(), clock: Callable[[], float] = time.monotonic):
        self._owners = None if file is None else _read(file)
        self._limits, self._clock = limits, clock
        self._turn = threading.Lock()
        self._tokens: dict[str, tuple[float, float]] = defaultdict(lambda: (float(limits.per_minute or 0), clock()))

    def welcomes(self, host: str | None) -> bool:
        """Whether a request may name this host. Without keys only this machine's own names may stand there, since a
        page from elsewhere can have its own name mean this machine."""
        return self._owners is not None or LOCAL.fullmatch(host or "") is not None

    def owner(self, authorization: str | None) -> str | None:
        """Whose request it is, by its header `Authorization: Bearer KEY`; None for nobody's."""
        if self._owners is None:
            return NOBODY
        scheme, _, key = (authorization or "").partition(" ")
        found = None
        hashed = _hash(key.strip())
        for owner in self._owners:  # all of them, so that time tells nothing
            if hmac.compare_digest(owner, hashed):
                found = owner
        return found if scheme.lower() == "bearer" else None

    def spend(self, owner: str) -> None:
        """Counts a request; RateLimitError where the owner has made too many."""
        per_minute = self._limits.per_minute
        if per_minute is None:
            return
        with self._turn:
            now = self._clock()
            left, before = self._tokens[owner]
            left = min(float(per_minute), left + (now - before) * per_minute / 60)
            self._tokens[owner] = (max(0.0, left - 1) if left >= 1 else left, now)
        if left < 1:
            raise RateLimitError(
                f"this key may make {per_minute} requests a minute: wait, or ask the server's owner for more",
                (1 - left) * 60 / per_minute,
            )


def keys_in(file: Path) -> dict[int, str]:
    """The keys of a file by the number of their line; UserError where there is none."""
    lines = [line.split("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines()]
    keys = {number: line for number, line in enumerate(lines, start=1) if line}
    if not keys:
        raise UserError(f"{file} holds no key: expected one a line; write one, or leave out --api-key-file")
    return keys


def _read(file: Path) -> list[str]:
    try:
        keys = keys_in(file)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read keys from {str(file)!r} ({error}): expected a text file with one a line"
        ) from None
    short = [number for number, key in keys.items() if len(key) < 16]
    if short:
        raise UserError(f"{file}: the key in line {short[0]} is short: expected at least 16 characters; draw a new one")
    return [_hash(key) for key in keys.values()]


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
