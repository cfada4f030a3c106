"""The real server round an engine that makes nothing: pictures drawn at once, so that what shows them can be tested."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import uvicorn

from dit_jax.config import UserError
from dit_jax.methods.plan import Plan, parse_plan
from infer.access import Access
from infer.buckets import Frame, ModelBuckets, Offer
from infer.journal import Journal
from infer.request import Defaults, Job, Limits, Request, check, fill
from infer.server import Server, build_app
from infer.server_metrics import ServerMetrics
from infer.tickets import Progress, Sample, Ticket

FAILS = "this one fails"
REASON = "the digits fell off: expected them to stay; hold them tighter"
PARTS = 4  # segments of a run
OFFERS = {
    "high": Offer(plan=Plan(), steps=30),
    "standard": Offer(plan=parse_plan("hsa:50"), steps=40),
    "fast": Offer(plan=Plan(), steps=10),
}
BUCKETS = {
    "demo-wan": ModelBuckets(
        shapes=(Frame(128, 128, 17), Frame(128, 128, 9), Frame(64, 64, 17), Frame(128, 64, 17)), offers=OFFERS
    ),
    "demo-flux": ModelBuckets(shapes=(Frame(128, 128), Frame(64, 64), Frame(128, 64), Frame(64, 128)), offers=OFFERS),
}
STAGES = {"queue": 0.02, "text": 0.11, "denoise": 0.83, "decode": 0.24}


@dataclass(kw_only=True)
class DrawnPipeline:
    """A pipeline as far as requests know it."""

    name: str
    defaults: Defaults
    limits: Limits
    programs: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(loaded_count=0))
    texts: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(hits=0))

    def prepare(self, request: Request) -> Job:
        job = fill(request, self.defaults, self.limits.scales)
        check(job, self.limits)
        return job


def pipelines() -> dict[str, DrawnPipeline]:
    video = Defaults(size=(128, 128), frames=17, steps=30, guidance=4.0, fps=8)
    image = Defaults(size=(128, 128), frames=1, steps=20, true_cfg=3.0, video=False)
    return {
        "demo-wan": DrawnPipeline(name="demo-wan", defaults=video, limits=Limits(space=16, time=4)),
        "demo-flux": DrawnPipeline(
            name="demo-flux", defaults=image, limits=Limits(space=16, time=1, video=False, scales="true_cfg")
        ),
    }


@dataclass(kw_only=True)
class CannedEngine:
    """Draws every ticket in a thread of its own; `going` cleared, each stops half way until it is set or given up.

    pace  seconds of a segment
    """

    pipelines: dict[str, DrawnPipeline]
    pace: float = 0.1
    waiting: int = 0
    running: int = 0
    tickets: list[Ticket] = field(default_factory=list)
    going: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.buckets = BUCKETS
        self.going.set()

    def start(self) -> None: ...

    def stop(self, patience: float) -> None: ...

    def check_room(self, count: int) -> None: ...

    def submit(self, tickets: list[Ticket], limited: bool = True) -> None:
        for ticket in tickets:
            self.tickets.append(ticket)
            threading.Thread(target=self._make, args=(ticket,), daemon=True).start()

    def _make(self, ticket: Ticket) -> None:
        job = ticket.job
        for part in range(PARTS):
            self._tell(ticket, part)
            while part == PARTS // 2 and not self.going.is_set() and not ticket.over:
                time.sleep(self.pace)
                self._tell(ticket, part)
            if ticket.over:
                return
            time.sleep(self.pace)
        if job.prompts[0] == FAILS:
            ticket.end(UserError(REASON))
            return
        frames = np.stack([drawn(job, frame / max(1, job.frames - 1)) for frame in range(job.frames)])
        told = {"prompt": job.prompts[0], "seed": job.seeds[0], "model": ticket.model, "plan": str(job.plan)}
        fps = self.pipelines[ticket.model].defaults.fps
        ticket.end(Sample(frames=frames, metadata=told, fps=fps, seconds=dict(STAGES), batch=1))

    def _tell(self, ticket: Ticket, part: int) -> None:
        job, shown = ticket.job, part > 0 and ticket.previews
        preview = drawn(job, 0, noise=1 - part / PARTS) if shown else None
        ticket.told(Progress(done=job.steps * part // PARTS, steps=job.steps, preview=preview))


def drawn(job: Job, moment: float, noise: float = 0.0) -> np.ndarray:
    """A ball before a striped wall, uint8 [H, W, 3]: the seed chooses the colours, `moment` 0 to 1 moves the ball."""
    (width, height), chance = job.size, np.random.default_rng(job.seeds[0])
    wall, stripe, ball = chance.uniform(30, 240, (3, 3))
    y, x = np.mgrid[:height, :width] / min(width, height)
    picture = np.where(((x + 0.6 * y) * 7 % 1 < 0.5)[..., None], wall, wall + 0.25 * (stripe - wall))
    middle = 0.3 + moment * 0.4
    away = np.hypot(x - middle, y - 0.55)[..., None]
    picture = np.where(away < 0.24, ball * (1.15 - 1.6 * away), picture)
    grain = np.random.default_rng(1).uniform(0, 255, picture.shape)
    return np.clip((1 - noise) * picture + noise * grain, 0, 255).astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class Site:
    """A server that runs, and what it is made of."""

    url: str
    engine: CannedEngine | None = None


@contextlib.contextmanager
def canned_site(folder: Path, keys: Path | None = None, warm: Callable[[], None] = lambda: None) -> Iterator[Site]:
    """The server on a free port of the loopback; it is ready when `warm` has returned."""
    engine = CannedEngine(pipelines=pipelines())
    journal = Journal(folder, quota_bytes=2**30, lifetime_seconds=3600)
    server = Server(engine=engine, journal=journal, access=Access(keys), metrics=ServerMetrics())
    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = uvicorn.Config(build_app(server, warm), log_level="warning", timeout_graceful_shutdown=1)
        running = uvicorn.Server(config)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield Site(url=f"http://127.0.0.1:{listening.getsockname()[1]}", engine=engine)
        finally:
            running.should_exit = True
            thread.join()
