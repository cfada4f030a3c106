"""Sending a load: open loop, each request when its time has come, or closed loop, to find what a server can do."""

from __future__ import annotations

import asyncio
import random
import statistics
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from infer.load_client import Answer, Outcome
from infer.load_mix import Arrival, Kind, Mix

FIRST_USUAL = 2.0  # seconds that a request is taken to need before one was answered
ENOUGH = 20  # answers that a capacity is told from
PAUSE = 1.0  # seconds before the next request where one was refused or failed
Ask = Callable[[Arrival, float | None], Awaitable[Answer]]


@dataclass(frozen=True, kw_only=True)
class Record:
    """What became of a request.

    due      seconds from the start at which it was to be sent
    late     seconds that it was sent after that
    seconds  from when it was due to its end
    """

    kind: Kind
    way: str
    bad: str | None
    due: float
    late: float
    seconds: float
    outcome: Outcome
    reason: str = ""
    status: int | None = None
    stages: Mapping[str, float] = field(default_factory=dict)

    @property
    def end(self) -> float:
        return self.due + self.seconds


async def open_loop(arrivals: Sequence[Arrival], ask: Ask, told: Callable[[Record], None]) -> list[Record]:
    """Sends each request when it is due, however many are on their way; returns once all have ended."""
    records: list[Record] = []
    now = asyncio.get_running_loop().time
    began = now()

    async def one(arrival: Arrival) -> None:
        late = now() - began - arrival.due
        patience = None if arrival.patience is None else arrival.patience * usual_seconds(records, arrival.kind)
        records.append(_record(arrival, await ask(arrival, patience), late, now() - began - arrival.due))
        told(records[-1])

    async with asyncio.TaskGroup() as tasks:
        for arrival in arrivals:
            await asyncio.sleep(began + arrival.due - now())
            tasks.create_task(one(arrival))
    return records


def _record(arrival: Arrival, answer: Answer, late: float, seconds: float) -> Record:
    return Record(
        kind=arrival.kind,
        way=arrival.way,
        bad=arrival.bad,
        due=arrival.due,
        late=late,
        seconds=seconds,
        outcome=answer.outcome,
        reason=answer.reason,
        status=answer.status,
        stages=answer.stages,
    )


def usual_seconds(records: Sequence[Record], kind: Kind) -> float:
    """How long a request of this kind has taken so far, or one of any kind."""
    good = [record for record in records if record.outcome == "ok"]
    alike = [record for record in good if record.kind == kind]
    return statistics.median([record.seconds for record in alike or good] or [FIRST_USUAL])


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What a server can do: `answers` sound requests in `seconds`; `errors` are the reasons of those that failed."""

    answers: int
    seconds: float
    errors: Sequence[str] = ()

    @property
    def rate(self) -> float:
        """Requests a second."""
        return self.answers / self.seconds


async def closed_loop(mix: Mix, rng: random.Random, ask: Ask, workers: int, seconds: float) -> Capacity:
    """Keeps so many sound requests on their way for so long, and longer while fewer than `ENOUGH` were answered.

    The first third of the time fills the server and is not counted. After ten times the time it ends in any case.
    """
    now = asyncio.get_running_loop().time
    began, errors = now(), list[str]()
    ends: list[float] = []  # of those that are counted

    def over() -> bool:
        spent = now() - began
        return spent > seconds and (len(ends) >= ENOUGH or spent > 10 * seconds)

    async def work() -> None:
        while not over():
            answer = await ask(mix.draw(rng), None)
            spent = now() - began
            if answer.outcome != "ok":
                if answer.outcome == "error":
                    errors.append(answer.reason)
                await asyncio.sleep(PAUSE)
            elif spent > seconds / 3 and not over():
                ends.append(spent)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(workers):
            tasks.create_task(work())
    return Capacity(answers=len(ends), seconds=max([seconds, *ends]) - seconds / 3, errors=errors)
