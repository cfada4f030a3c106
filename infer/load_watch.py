"""A server under load, from outside: its process' memory, and what it tells Prometheus."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from dit_jax.config import UserError

WARM_UP = 0.2  # of the time: memory may grow in it
TENTH = 0.1
COMPILED, WAITING, RUNNING = "dit_compilations_total", "dit_waiting_samples", "dit_running_samples"
SETTLE = 30.0  # seconds that given up work may take to leave the server


def resident_bytes(pid: int) -> int:
    """The memory of a process that is in RAM, in bytes; ProcessLookupError where there is none of that number."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except FileNotFoundError:
        raise ProcessLookupError(pid) from None
    if pages == 0:  # it has ended, and its parent does not know yet
        raise ProcessLookupError(pid)
    return pages * os.sysconf("SC_PAGE_SIZE")


@dataclass(kw_only=True)
class Memory:
    """Seconds from the start, and bytes at each; `gone` once the process is."""

    seconds: list[float] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    gone: bool = False

    async def watch(self, pid: int, every: float = 1.0) -> None:
        """Looks until it is cancelled, or the process is gone."""
        now = asyncio.get_running_loop().time
        began = now()
        while not self.gone:
            try:
                self.bytes.append(resident_bytes(pid))
                self.seconds.append(now() - began)
            except ProcessLookupError:
                self.gone = True
            await asyncio.sleep(every)

    @property
    def samples(self) -> dict[str, Sequence[float]]:
        """What was seen, as JSON can hold it."""
        return {"seconds": self.seconds, "bytes": self.bytes}

    def summary(self) -> dict[str, Any] | None:
        """Bytes early and late, and the growth from one to the other; None where there is too little to tell."""
        ends = growth(self.bytes)
        if ends is None:
            return None
        first, last = ends
        return {"first_bytes": first, "last_bytes": last, "most_bytes": max(self.bytes), "growth": last / first - 1}


def growth(samples: Sequence[int]) -> tuple[float, float] | None:
    """Medians of the first and the last tenth of what follows the warm-up."""
    warm = samples[int(len(samples) * WARM_UP) :]
    part = int(len(warm) * TENTH)
    return (float(np.median(warm[:part])), float(np.median(warm[-part:]))) if part else None


def check_process(pid: int) -> None:
    """UserError where its memory cannot be seen."""
    try:
        resident_bytes(pid)
    except (OSError, IndexError, ValueError):
        raise UserError(
            f"--pid {pid} cannot be watched: expected the number of a process that runs on this machine, under Linux; "
            "name the server's, or leave it out"
        ) from None


async def read_metrics(http: httpx.AsyncClient) -> Mapping[str, float] | None:
    """What /metrics says without labels; None where there is nothing."""
    try:
        answer = await http.get("/metrics", timeout=10.0)
        lines = [line for line in answer.text.splitlines() if line and not line.startswith("#") and "{" not in line]
        return {name: float(value) for name, value in map(str.split, lines)} if answer.is_success else None
    except (httpx.HTTPError, ValueError):
        return None


async def settled_metrics(http: httpx.AsyncClient) -> Mapping[str, float] | None:
    """The metrics, once nothing waits or runs any more; at the latest after `SETTLE` seconds."""
    now = asyncio.get_running_loop().time
    end = now() + SETTLE
    while (metrics := await read_metrics(http)) and now() < end:
        if metrics.get(WAITING, 0) + metrics.get(RUNNING, 0) == 0:
            break
        await asyncio.sleep(0.5)
    return metrics


def metric_changes(before: Mapping[str, float] | None, after: Mapping[str, float] | None) -> dict[str, float] | None:
    """What a load has made of a server: programs compiled during it, samples that are left after it."""
    if before is None or after is None or COMPILED not in before or COMPILED not in after:
        return None
    told = {"waiting": after.get(WAITING, 0.0), "running": after.get(RUNNING, 0.0)}
    return {"compilations": after[COMPILED] - before[COMPILED], **told}
