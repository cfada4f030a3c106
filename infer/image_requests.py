"""Images that are made while the client waits, all at once or told of as they become clear."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dit_jax.config import UserError
from infer.api_types import ImageRequest, Picture, Pictures
from infer.asked import Asked, asked_of
from infer.engine import Engine
from infer.journal import Journal
from infer.media import with_comment
from infer.tickets import Progress, Sample, StoppedError, Ticket

URL = "/v1/images/{id}/content"
TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


class ImageRequests:
    """The images of a server."""

    def __init__(self, engine: Engine, journal: Journal):
        self.engine, self.journal = engine, journal
        self._media = ThreadPoolExecutor(2, "images")

    def begin(self, request: ImageRequest) -> tuple[Asked, list[Ticket]]:
        """Samples on their way; UserError for what is not served, QueueFullError where too many wait."""
        asked = asked_of(request, self.engine.pipelines, self.engine.buckets)
        count = len(asked.job.prompts)
        tickets = [
            Ticket(
                model=asked.model, job=asked.job.single(index), previews=bool(request.stream and request.partial_images)
            )
            for index in range(count)
        ]
        self.engine.submit(tickets)
        return asked, tickets

    async def answer(
        self, request: ImageRequest, asked: Asked, tickets: list[Ticket], owner: str, base: str
    ) -> Pictures:
        """The whole answer; whoever stops waiting gives the samples up."""
        try:
            samples = await asyncio.gather(*map(_awaited, tickets))
        finally:
            for ticket in tickets:
                ticket.cancel()
        run = asyncio.get_running_loop().run_in_executor
        made = [await run(self._media, self._picture, request, sample, owner, base) for sample in samples]
        return Pictures(
            created=int(time.time()), data=made, output_format=_kind(request), quality=asked.quality,
            size=asked.size, plan=str(asked.job.plan), usage=_usage(), timings=samples[0].seconds,
            notes=list(samples[0].notes) or None,
        )  # fmt: skip

    async def stream(self, request: ImageRequest, asked: Asked, tickets: list[Ticket]) -> AsyncIterator[dict[str, Any]]:
        """OpenAI's events: pictures of what comes, as many as were asked for, and the image of each sample.

        Between them `image_generation.progress` where that was asked for; `error` for a sample that failed.
        """
        news = _news_of(tickets)
        shown, left = dict.fromkeys(tickets, 0), len(tickets)
        common = {
            "created_at": int(time.time()), "size": asked.size, "quality": asked.quality,
            "background": "opaque", "output_format": _kind(request),
        }  # fmt: skip
        try:
            while left:
                ticket, progress = await news.get()
                if progress is None:
                    left -= 1
                    yield await self._last(request, asked, ticket, common)
                    continue
                percent = int(100 * progress.done / progress.steps)
                if progress.preview is not None and shown[ticket] < (request.partial_images or 0):
                    yield common | {
                        "type": "image_generation.partial_image", "partial_image_index": shown[ticket],
                        "b64_json": await self._base64(progress.preview, request), "progress": percent,
                    }  # fmt: skip
                    shown[ticket] += 1
                elif request.stream_progress:
                    yield {"type": "image_generation.progress", "progress": percent}
        finally:
            for ticket in tickets:
                ticket.cancel()

    async def _last(
        self, request: ImageRequest, asked: Asked, ticket: Ticket, common: dict[str, Any]
    ) -> dict[str, Any]:
        error = ticket.result.exception()
        if error is not None:
            kind = "invalid_request_error" if isinstance(error, UserError) else "server_error"
            message = str(error) if isinstance(error, UserError | StoppedError) else "the image could not be made"
            return {"type": "error", "error": {"message": message, "type": kind, "param": None, "code": None}}
        sample = ticket.result.result()
        return common | {
            "type": "image_generation.completed", "b64_json": await self._base64(sample.frames[0], request, sample),
            "usage": _usage(), "seed": sample.metadata["seed"], "plan": str(asked.job.plan), "timings": sample.seconds,
            "notes": list(sample.notes),
        }  # fmt: skip

    async def _base64(self, frame: np.ndarray, request: ImageRequest, sample: Sample | None = None) -> str:
        run = asyncio.get_running_loop().run_in_executor
        return base64.b64encode(await run(self._media, encoded, frame, request, sample)).decode()

    def file(self, id: str, owner: str) -> tuple[Path, str] | None:
        """The file of an image that was asked for by URL, and its type."""
        for kind, type in TYPES.items():
            path = self.journal.file(id, owner, f"image.{kind}")
            if path is not None:
                return path, type
        return None

    def close(self) -> None:
        """Waits until what is being written is."""
        self._media.shutdown(wait=True)

    def _picture(self, request: ImageRequest, sample: Sample, owner: str, base: str) -> Picture:
        data, seed = encoded(sample.frames[0], request, sample), sample.metadata["seed"]
        if request.response_format != "url":
            return Picture(b64_json=base64.b64encode(data).decode(), seed=seed)
        told = {"prompt": request.prompt, "seed": seed}
        record = self.journal.accept(kind="image", model=sample.metadata["model"], owner=owner, request=told)
        self.journal.completed(record.id, {"timings": sample.seconds}, {f"image.{_kind(request)}": data})
        return Picture(url=base + URL.format(id=record.id), seed=seed)


def _awaited(ticket: Ticket) -> asyncio.Future[Sample]:
    """Its result; whoever stops waiting for it does not end it, and what becomes of it then is nobody's error."""
    result = asyncio.wrap_future(ticket.result)
    result.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    return asyncio.shield(result)


def _news_of(tickets: list[Ticket]) -> asyncio.Queue[tuple[Ticket, Progress | None]]:
    """What happens to them from now on; None behind a ticket that has ended."""
    loop, news = asyncio.get_running_loop(), asyncio.Queue[tuple[Ticket, Progress | None]]()

    def tell(ticket: Ticket, progress: Progress | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            loop.call_soon_threadsafe(news.put_nowait, (ticket, progress))

    def over(ticket: Ticket, _: Any) -> None:
        tell(ticket, None)

    for ticket in tickets:
        ticket.told = partial(tell, ticket)
        ticket.result.add_done_callback(partial(over, ticket))
    return news


def _kind(request: ImageRequest) -> str:
    return request.output_format or "png"


def _usage() -> dict[str, Any]:
    """No tokens are counted here, but OpenAI's clients expect their number."""
    counts = {"image_tokens": 0, "text_tokens": 0}
    return {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0, "input_tokens_details": counts}


def encoded(frame: np.ndarray, request: ImageRequest, sample: Sample | None = None) -> bytes:
    """A picture uint8 [H, W, 3] as a file; what made it goes with it, as `dit-generate` writes it."""
    file = io.BytesIO()
    kind = _kind(request)
    quality = 95 if request.output_compression is None else request.output_compression
    options: dict[str, Any] = {} if kind == "png" else {"quality": quality}
    if sample is not None:
        options |= with_comment(kind, sample.metadata)
    Image.fromarray(frame).save(file, kind.upper(), **options)
    return file.getvalue()
