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
    began: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
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
        """Serves, and goes on with what a server before this one has left."""
        self.engine.start()
        if left := self.videos.resume():
            logger.info("going on with %d jobs of the last run", left)
        self.ready.set()

    def end(self) -> None:
        """Lets what runs finish, and writes it down; the rest is the next server's."""
        self.ready.clear()
        self.engine.stop(self.patience)
        self.videos.close()
        self.images.close()
        self.journal.close()


def build_app(server: Server, warm: Callable[[], None] = lambda: None) -> FastAPI:
    """The application; `warm` compiles what it serves, in a thread of its own, before it says that it is ready."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        def prepare() -> None:
            warm()
            server.begin()

        preparing = asyncio.create_task(asyncio.to_thread(prepare))
        preparing.add_done_callback(_stop_on_failure)
        sweeping = asyncio.create_task(_sweep(server))
        yield
        sweeping.cancel()
        await asyncio.to_thread(server.end)

    app = FastAPI(title="dit-jax", version="1", lifespan=lifespan, docs_url=None, redoc_url=None)
    handle_errors(app)
    _guard(app, server)
    add_routes(app, server)
    return app


def _stop_on_failure(preparing: asyncio.Task[None]) -> None:
    if not preparing.cancelled() and (error := preparing.exception()):
        logger.error("the server cannot start", exc_info=error)
        os.kill(os.getpid(), signal.SIGTERM)


async def _sweep(server: Server) -> None:
    while True:
        await asyncio.sleep(SWEEP)
        await asyncio.to_thread(server.journal.sweep)


def _guard(app: FastAPI, server: Server) -> None:
    """Lets pass what may: a known key, no page of another origin, and work only once all is compiled."""

    @app.middleware("http")
    async def guard(request: Request, call_next: RequestResponseEndpoint):
        refused = _refused(request, server)
        answer = refused or await call_next(request)
        route = request.scope.get("route")
        server.metrics.answers.labels(
            route=getattr(route, "path", "refused" if refused else "unknown"), status=str(answer.status_code)
        ).inc()
        return answer


def _refused(request: Request, server: Server):
    origin, host = request.headers.get("origin"), request.headers.get("host")
    if origin is not None and origin.partition("://")[2] != host:
        return failure(403, f"a page of {origin[:80]} may not ask this server: use its own page", "permission_error")
    if not request.url.path.startswith("/v1/"):
        return None
    owner = server.access.owner(request.headers.get("authorization"))
    if owner is None:
        return failure(
            401, "no known API key was sent: expected the header Authorization: Bearer KEY; add it",
            "authentication_error", code="invalid_api_key",
        )  # fmt: skip
    request.state.owner = owner
    if request.method == "POST" and request.url.path in MAKING:
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
