"""The routes of the server: images, videos, events, models, health, metrics, and a page."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import FastAPI, Query, Request, Response
from fastapi import Path as InPath
from fastapi.responses import FileResponse, HTMLResponse, StreamingResponse
from starlette.exceptions import HTTPException

from infer.api_types import Failure, ImageRequest, Pictures, Video, VideoRequest
from infer.http_errors import failure
from infer.image_requests import ImageRequests, encoded
from infer.reading import read_json, read_video_request
from infer.tickets import Progress

if TYPE_CHECKING:
    from infer.server import Server

PAGE = Path(__file__).parent / "page" / "index.html"
HEARTBEAT = 15.0  # seconds between signs of life on a quiet stream
REFUSALS: dict[int | str, dict[str, Any]] = {
    code: {"model": Failure} for code in (400, 401, 403, 404, 408, 409, 413, 429, 503)
}
STREAM = "text/event-stream"
VideoId = Annotated[str, InPath(pattern="^video_[0-9a-f]{32}$")]
ImageId = Annotated[str, InPath(pattern="^image_[0-9a-f]{32}$")]


def add_routes(app: FastAPI, server: Server) -> None:
    """Adds all of them."""
    _about(app, server)
    _images(app, server)
    _videos(app, server)
    _video(app, server)


def _about(app: FastAPI, server: Server) -> None:
    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> FileResponse:
        headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
        return FileResponse(PAGE, headers=headers)

    @app.get("/health/live")
    async def live() -> dict[str, str]:
        return {"status": "live"}

    @app.get("/health/ready", responses={503: {"model": Failure}})
    async def ready() -> Any:
        if not server.ready.is_set():
            return failure(503, "programs are being compiled, or the server is stopping", "server_error")
        return {"status": "ready"}

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models", responses=REFUSALS)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [described(server, name) for name in server.engine.pipelines]}


POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src 'self' data: blob:; "
    "media-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def described(server: Server, name: str) -> dict[str, Any]:
    """A model as /v1/models lists it."""
    pipe, buckets = server.engine.pipelines[name], server.engine.buckets[name]
    return {
        "id": pipe.name,
        "object": "model",
        "created": server.began,
        "owned_by": "dit-jax",
        "kind": "video" if pipe.defaults.video else "image",
        "image_input": pipe.limits.image,
        "fps": pipe.defaults.fps,
        "sizes": sorted({f"{shape.width}x{shape.height}" for shape in buckets.shapes}),
        "shapes": [str(shape) for shape in buckets.shapes],
        "default_shape": str(buckets.usual(pipe)),
        "qualities": {quality: {"plan": str(one.plan), "steps": one.steps} for quality, one in buckets.offers.items()},
    }


def _images(app: FastAPI, server: Server) -> None:
    images: ImageRequests = server.images
    body = {"content": {"application/json": {"schema": ImageRequest.model_json_schema()}}, "required": True}

    @app.post(
        "/v1/images/generations", response_model=Pictures, response_model_exclude_none=True,
        responses={200: {"content": {STREAM: {}}}, **REFUSALS}, openapi_extra={"requestBody": body},
    )  # fmt: skip
    async def generate(request: Request) -> Any:
        asked = await read_json(request, ImageRequest)
        job, tickets = await asyncio.to_thread(images.begin, asked)
        if asked.stream:
            return _streamed(images.stream(asked, job, tickets))
        answer = asyncio.create_task(
            images.answer(asked, job, tickets, request.state.owner, str(request.base_url).rstrip("/"))
        )
        return await _unless_gone(request, answer)

    @app.get("/v1/images/{id}/content", response_class=FileResponse, responses=REFUSALS)
    async def image(id: ImageId, request: Request) -> FileResponse:
        found = await asyncio.to_thread(server.images.file, id, request.state.owner)
        return await _file(found, f"there is no image {id}: it was never made, or its time is over")


def _videos(app: FastAPI, server: Server) -> None:
    fields = VideoRequest.model_json_schema()
    form = fields | {"properties": fields["properties"] | {"input_reference": {"type": "string", "format": "binary"}}}
    body = {"content": {"application/json": {"schema": fields}, "multipart/form-data": {"schema": form}}}

    @app.post(
        "/v1/videos", response_model=Video, responses=REFUSALS, openapi_extra={"requestBody": body | {"required": True}}
    )
    async def create(request: Request) -> Video:
        server.engine.check_room(1)
        asked, reference = await read_video_request(request, server.uploads)
        return await asyncio.to_thread(server.videos.create, asked, reference, request.state.owner)

    @app.get("/v1/videos", responses=REFUSALS)
    async def page(
        request: Request,
        after: Annotated[str | None, Query(pattern="^video_[0-9a-f]{32}$")] = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> dict[str, Any]:
        videos, more = await asyncio.to_thread(server.videos.page, request.state.owner, after, limit, order == "desc")
        ends = {"first_id": videos[0].id, "last_id": videos[-1].id} if videos else {"first_id": None, "last_id": None}
        return {"object": "list", "data": videos, "has_more": more, **ends}


def _video(app: FastAPI, server: Server) -> None:
    videos = server.videos

    @app.get("/v1/videos/{id}", response_model=Video, responses=REFUSALS)
    async def retrieve(id: VideoId, request: Request) -> Video:
        return _there(await asyncio.to_thread(videos.get, id, request.state.owner), id)

    @app.delete("/v1/videos/{id}", responses=REFUSALS)
    async def delete(id: VideoId, request: Request) -> dict[str, Any]:
        _there(await asyncio.to_thread(videos.delete, id, request.state.owner) or None, id)
        return {"id": id, "object": "video.deleted", "deleted": True}

    @app.post("/v1/videos/{id}/cancel", response_model=Video, responses=REFUSALS)
    async def cancel(id: VideoId, request: Request) -> Video:
        return _there(await asyncio.to_thread(videos.cancel, id, request.state.owner), id)

    @app.get("/v1/videos/{id}/content", response_class=FileResponse, responses=REFUSALS)
    async def content(
        id: VideoId, request: Request, variant: Literal["video", "thumbnail", "spritesheet"] = "video"
    ) -> Any:
        video = _there(await asyncio.to_thread(videos.get, id, request.state.owner), id)
        found = await asyncio.to_thread(videos.file, id, request.state.owner, variant)
        if found is None:
            return failure(409, f"{id} is {video.status}: expected it to be completed; wait", "invalid_request_error")
        return await _file(found, _no_video(id), f"{id}{found[0].suffix}")

    @app.get("/v1/videos/{id}/events", responses={200: {"content": {STREAM: {}}}, **REFUSALS})
    async def events(id: VideoId, request: Request, previews: bool = True) -> StreamingResponse:
        _there(await asyncio.to_thread(videos.get, id, request.state.owner), id)
        return _streamed(_told(videos.events(id, request.state.owner, previews)))


def _there(found: Any, id: str) -> Any:
    if found is None:
        raise HTTPException(404, _no_video(id))
    return found


def _no_video(id: str) -> str:
    return f"there is no video {id}: it was never asked for, was deleted, or its time is over"


async def _file(found: tuple[Path, str] | None, missing: str, name: str | None = None) -> FileResponse:
    """A file of this type as an answer; 404 where there is none, or none any more."""
    if found is not None:
        path, type = found
        with contextlib.suppress(FileNotFoundError):
            return FileResponse(path, media_type=type, filename=name, stat_result=await asyncio.to_thread(path.stat))
    raise HTTPException(404, missing)


async def _told(events: AsyncIterator[tuple[Video, Progress | None]]) -> AsyncIterator[dict[str, Any]]:
    """`video.progress` with the job and, where there is one, a preview; at the end `video.completed` or `.failed`."""
    shown = None
    async for video, progress in events:
        ended = video.status in ("completed", "failed")
        told: dict[str, Any] = {"type": f"video.{video.status if ended else 'progress'}", "video": video.model_dump()}
        preview = progress.preview if progress else None
        if preview is not None and preview is not shown and not ended:
            shown = preview
            picture = await asyncio.to_thread(encoded, preview, ImageRequest(prompt="x", output_format="webp"))
            told["preview_b64_json"] = base64.b64encode(picture).decode()
        yield told


def _streamed(told: AsyncIterator[dict[str, Any]]) -> StreamingResponse:
    # Proxies neither keep nor collect what is told of a run.
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(_as_events(told), media_type=STREAM, headers=headers)


async def _as_events(told: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    """Server-sent events, with a sign of life while nothing happens."""
    following = asyncio.ensure_future(anext(told, None))
    try:
        while True:
            done, _ = await asyncio.wait([following], timeout=HEARTBEAT)
            if not done:
                yield ": still here\n\n"
                continue
            event = following.result()
            if event is None:
                return
            yield f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"
            following = asyncio.ensure_future(anext(told, None))
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await told.aclose()  # type: ignore[attr-defined]


async def _unless_gone(request: Request, answer: asyncio.Task) -> Any:
    """The answer; whoever hangs up before it is there gives it up."""

    async def hung_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    gone = asyncio.create_task(hung_up())
    await asyncio.wait([answer, gone], return_when=asyncio.FIRST_COMPLETED)
    gone.cancel()
    if not answer.done():
        answer.cancel()
        await asyncio.gather(answer, return_exceptions=True)
        return failure(499, "the client is gone", "invalid_request_error")
    return answer.result()
