"""The HTTP server: its parts, its life, and what guards every request."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from fastapi import FastAPI, Request
from starlette.middleware.base import RequestResponseEndpoint

from infer.access import Access, RateLimitError
from infer.engine import Engine
from infer.http_errors import failure, handle_errors, too_soon
from infer.image_requests import ImageRequests
from infer.journal import Journal
from infer.routes import add_routes
from infer.server_metrics import ServerMetrics
from infer.uploads import UploadLimits
from infer.video_jobs import VideoJobs

logger = logging.getLogger(__name__)
SWEEP = 60.0  # seconds between two looks at what may go
MAKING = ("/v1/images/generations", "/v1/videos")


@dataclass(kw_only=True)
class Server:
    """What answers requests; `ready` is set once all is compiled.

    patience  seconds that what runs may take when the server is told to stop
    """

    engine: Engine
    journal: Journal
    access: Access
    metrics: ServerMetrics
    uploads: UploadLimits = field(default_factory=UploadLimits)
    patience: float = 30.0
    ready: threading.Event = field(default_factory=threading.Event)
    failed: bool = False
    began: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.stopping = threading.Event()
        self._life = threading.Lock()
        self.videos = VideoJobs(self.engine, self.journal)
        self.images = ImageRequests(self.engine, self.journal)
        engine, gauge = self.engine, self.metrics.gauge
        gauge("dit_waiting_samples", "Samples whose turn has not come", lambda: engine.waiting)
        gauge("dit_running_samples", "Samples that are being made", lambda: engine.running)
        gauge("dit_ready", "Whether all is compiled", lambda: float(self.ready.is_set()))
        pipes = list(engine.pipelines.values())
        count = self.metrics.count
        count("dit_store_hits", "Programs from the store", lambda: sum(one.programs.loaded_count for one in pipes))
        count("dit_text_hits", "Prompts whose text was encoded before", lambda: sum(one.texts.hits for one in pipes))

    def begin(self) -> None:
        """Serves, and goes on with what a server before this one has left; does nothing once it is to stop."""
        with self._life:
            if self.stopping.is_set():
                return
            self.engine.start()
            if left := self.videos.resume():
                logger.info("going on with %d jobs of the last run", left)
            self.ready.set()

    def stop(self) -> None:
        """Takes nothing new from now on, and lets what runs finish; returns at once."""
        self._close_doors()
        threading.Thread(target=self.engine.stop, args=(self.patience,), daemon=True).start()

    def _close_doors(self) -> None:
        self.ready.clear()
        self.stopping.set()

    def sweep(self) -> None:
        """Writes down what could not be written down before, and lets go what is old or too much."""
        self.videos.retry()
        self.journal.sweep()

    def end(self) -> None:
        """Waits for what runs, and writes it down; the rest is the next server's."""
        self._close_doors()
        with self._life:
            self.engine.stop(self.patience)
        self.videos.close()
        self.images.close()
        self.journal.close()


def build_app(server: Server, warm: Callable[[], None] = lambda: None) -> FastAPI:
    """The application; `warm` compiles what it serves, in a thread of its own, before it says that it is ready."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        threading.Thread(target=_prepare, args=(server, warm), name="preparing", daemon=True).start()
        sweeping = asyncio.create_task(_sweep(server))
        yield
        sweeping.cancel()
        await asyncio.to_thread(server.end)

    app = FastAPI(title="dit-jax", version="1", lifespan=lifespan, docs_url=None, redoc_url=None)
    handle_errors(app)
    _guard(app, server)
    add_routes(app, server)
    return app


def _prepare(server: Server, warm: Callable[[], None]) -> None:
    try:
        warm()
        server.begin()
    except Exception:
        if not server.stopping.is_set():
            logger.exception("the server cannot start")
            server.failed = True
            os.kill(os.getpid(), signal.SIGTERM)


async def _sweep(server: Server) -> None:
    while True:
        await asyncio.sleep(SWEEP)
        try:
            await asyncio.to_thread(server.sweep)
        except Exception:  # a full disk, say: the next time it may go better
            logger.exception("results could not be looked through")


def _guard(app: FastAPI, server: Server) -> None:
    """Lets pass what may: a known key, no page of another origin, and work only once all is compiled."""

    @app.middleware("http")
    async def guard(request: Request, call_next: RequestResponseEndpoint):
        refused = _refused(request, server)
        status = "500"
        try:
            answer = refused or await call_next(request)
            status = str(answer.status_code)
            return answer
        finally:
            route = getattr(request.scope.get("route"), "path", "refused" if refused else "unknown")
            server.metrics.answers.labels(route=route, status=status).inc()


def _refused(request: Request, server: Server):
    origin, host = request.headers.get("origin"), request.headers.get("host")
    if origin is not None and origin.partition("://")[2] != host:
        return failure(403, f"a page of {origin[:80]} may not ask this server: use its own page", "permission_error")
    if not server.access.welcomes(host):
        return failure(
            403, "without keys this server answers to localhost alone: ask it by that name, or give it --api-key-file",
            "permission_error",
        )  # fmt: skip
    path = request.scope["path"]
    if not path.startswith("/v1/"):
        return None
    owner = server.access.owner(request.headers.get("authorization"))
    if owner is None:
        return failure(
            401, "no known API key was sent: expected the header Authorization: Bearer KEY; add it",
            "authentication_error", code="invalid_api_key",
        )  # fmt: skip
    request.state.owner = owner
    if request.method == "POST" and path in MAKING:
        if not server.ready.is_set():
            return failure(
                503, "the server is compiling, or stopping: wait for /health/ready", "server_error",
                **{"Retry-After": "5"},
            )  # fmt: skip
        try:
            server.access.spend(owner)
        except RateLimitError as error:
            return too_soon(error)
    return None
