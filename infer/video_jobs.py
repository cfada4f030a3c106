"""Videos that are asked for, made and fetched later: jobs in a journal, run by the engine, told of as they go."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import tempfile
import threading
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import ValidationError

from dit_jax.config import UserError
from infer import media
from infer.api_types import Video, VideoRequest
from infer.asked import Asked, asked_of
from infer.contact_sheet import contact_sheet
from infer.engine import Engine
from infer.job_records import JobRecord
from infer.journal import Journal
from infer.tickets import CancelledError, Progress, QueueFullError, Sample, StoppedError, Ticket

logger = logging.getLogger(__name__)
VIDEO, THUMBNAIL, SHEET, REFERENCE = "video.mp4", "thumbnail.webp", "spritesheet.jpg", "reference.png"
VARIANTS = {"video": VIDEO, "thumbnail": THUMBNAIL, "spritesheet": SHEET}
MOST_UNWRITTEN = 8  # jobs that are done but not on the disk; the engine waits for their turn
MOST_ATTEMPTS = 3  # times that a job may be under way when its server dies
TYPES = {VIDEO: "video/mp4", THUMBNAIL: "image/webp", SHEET: "image/jpeg"}


@dataclass(kw_only=True, eq=False)
class Live:
    """A job that the engine has: how far it is, and who listens."""

    ticket: Ticket
    progress: Progress
    listeners: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = field(default_factory=list)


class VideoJobs:
    """The videos of a server; `owner` is whose job it is, and nobody else's."""

    def __init__(self, engine: Engine, journal: Journal):
        self.engine, self.journal = engine, journal
        self._live: dict[str, Live] = {}
        self._turn = threading.Lock()
        self._writer = ThreadPoolExecutor(1, "journal")
        self._media = ThreadPoolExecutor(2, "media")
        self._room = threading.Semaphore(MOST_UNWRITTEN)
        self._unwritten: dict[str, str] = {}

    def create(self, request: VideoRequest, reference: Image.Image | None, owner: str) -> Video:
        """A new job; UserError for what is not served, QueueFullError where too many wait, StoppedError at the end."""
        asked = asked_of(request, self.engine.pipelines, self.engine.buckets, reference)
        self.engine.check_room(1)
        inputs = {} if reference is None else {REFERENCE: _png(reference)}
        record = self.journal.accept(
            kind="video", model=asked.model, owner=owner, request=_settled(request, asked), inputs=inputs
        )
        try:
            self._run(record, asked)
        except StoppedError:  # the client hears of it, so that the next process must not make it
            self.journal.deleted(record.id, owner)
            raise
        return self.view(record)

    def resume(self) -> int:
        """Runs again what had not ended when the last process did; how many jobs that are."""
        records = self.journal.unfinished()
        for record in records:
            if record.kind != "video":
                self.journal.failed(record.id, "server_error", "the server was restarted")
                continue
            if record.attempts >= MOST_ATTEMPTS:
                self.journal.failed(record.id, "server_error", f"the server died {record.attempts} times while it ran")
                continue
            try:
                self._run(record, self._asked_again(record))
            except StoppedError:  # then they are the next process's
                break
            except Exception as error:
                logger.warning("%s cannot be made any more", record.id, exc_info=error)
                self.journal.failed(record.id, *_reason(error))
        return len(records)

    def _asked_again(self, record: JobRecord) -> Asked:
        told = {name: value for name, value in record.request.items() if name != "quality"}
        path = self.journal.file(record.id, record.owner, REFERENCE) if REFERENCE in record.inputs else None
        reference = media.open_image(path) if path else None
        try:
            request = VideoRequest(**told)
        except ValidationError as error:
            first = error.errors()[0]
            what = f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}"
            raise UserError(f"this server no longer takes what it took before ({what}); ask for it again") from error
        return asked_of(request, self.engine.pipelines, self.engine.buckets, reference)

    def _run(self, record: JobRecord, asked: Asked) -> None:
        ticket = Ticket(model=asked.model, job=asked.job, told=partial(self._told, record.id))
        with self._turn:
            self._live[record.id] = Live(ticket=ticket, progress=Progress(done=0, steps=asked.job.steps))
        try:
            self.engine.submit([ticket], limited=False)
        except StoppedError:
            with self._turn:
                del self._live[record.id]
            raise
        ticket.result.add_done_callback(partial(self._ended, record.id, asked.fps))

    def _told(self, id: str, progress: Progress) -> None:
        if progress.done == 0:
            self._writer.submit(self.journal.started, id)
        with self._turn:
            live = self._live.get(id)
            if live is not None:
                shown = progress.preview if progress.preview is not None else live.progress.preview
                live.progress = replace(progress, preview=shown)
                _wake(live)

    def _ended(self, id: str, fps: int, result) -> None:
        if result.exception() is None:
            self._room.acquire()
        self._media.submit(self._record, id, fps, result)

    def _record(self, id: str, fps: int, result) -> None:
        """Writes down how a job ended."""
        error = result.exception()
        try:
            if error is None:
                sample = result.result()
                files = _files(sample, fps)
                told = {"timings": sample.seconds, "batch": sample.batch, "notes": list(sample.notes)}
                self._writer.submit(self.journal.completed, id, told, files).result()
            elif isinstance(error, StoppedError):  # the next process runs it
                with contextlib.suppress(Exception):  # or it has one attempt fewer
                    self._writer.submit(self.journal.put_back, id).result()
            else:
                self._writer.submit(self.journal.failed, id, *_reason(error)).result()
        except Exception as fault:
            logger.exception("the result of %s could not be kept", id)
            self._unwritten[id] = f"the result could not be kept: {fault}"
            with contextlib.suppress(Exception):  # the next sweep tries again
                self.retry()
        finally:
            if error is None:
                self._room.release()
            with self._turn:
                live = self._live.pop(id, None)
                if live is not None:
                    _wake(live)

    def retry(self) -> None:
        """Writes down what failed when that could not be written down."""
        for id, reason in list(self._unwritten.items()):
            self._writer.submit(self.journal.failed, id, "server_error", reason).result()
            del self._unwritten[id]

    def get(self, id: str, owner: str) -> Video | None:
        """The owner's job of that id."""
        record = self.journal.get(id, owner)
        return None if record is None or record.kind != "video" else self.view(record)

    def page(self, owner: str, after: str | None, limit: int, newest_first: bool) -> tuple[list[Video], bool]:
        """The owner's jobs behind `after`, and whether there are more."""
        records, more = self.journal.page(owner, "video", after=after, limit=limit, newest_first=newest_first)
        return [self.view(record) for record in records], more

    def view(self, record: JobRecord) -> Video:
        """A job as the API shows it."""
        asked, live = record.request, self._live.get(record.id)
        done = live.progress.done / live.progress.steps if live else 0.0
        ended = None if record.ended is None else int(record.ended)
        return Video(
            id=record.id,
            model=self.engine.pipelines[record.model].name if record.model in self.engine.pipelines else record.model,
            status=record.status,
            progress=100 if record.status == "completed" else min(99, int(100 * done)),
            created_at=int(record.created),
            started_at=None if record.started is None else int(record.started),
            completed_at=ended if record.status == "completed" else None,
            expires_at=None if record.expires is None else int(record.expires),
            seconds=f"{asked['frames'] / asked['fps']:g}",
            error=record.error,
            timings=(record.result or {}).get("timings"),
            notes=(record.result or {}).get("notes") or None,
            **{name: asked[name] for name in ("prompt", "size", "frames", "fps", "seed", "plan", "quality")},
        )

    def cancel(self, id: str, owner: str) -> Video | None:
        """Gives a job up that has not ended: it fails with the code `cancelled`."""
        record = self.journal.get(id, owner)
        if record is None:
            return None
        if record.ended is None:
            self.journal.failed(id, *_reason(CancelledError()))
            with self._turn:
                live = self._live.get(id)
            if live is not None:
                live.ticket.cancel()
        return self.get(id, owner)

    def delete(self, id: str, owner: str) -> bool:
        """Forgets a job and its files, whether or not it has ended."""
        gone = self.journal.deleted(id, owner)
        with self._turn:
            live = self._live.get(id)
        if gone and live is not None:
            live.ticket.cancel()
        return gone

    def file(self, id: str, owner: str, variant: str) -> tuple[Path, str] | None:
        """A file of a completed job, and its type."""
        name = VARIANTS[variant]
        path = self.journal.file(id, owner, name)
        return None if path is None else (path, TYPES[name])

    async def events(self, id: str, owner: str, previews: bool) -> AsyncIterator[tuple[Video, Progress | None]]:
        """The job now, and whenever it is further on, until it has ended or is gone."""
        woken = asyncio.Event()
        listener = (asyncio.get_running_loop(), woken)
        with self._turn:
            live = self._live.get(id)
            if live is not None:
                live.listeners.append(listener)
                live.ticket.previews |= previews
        try:
            while True:
                goes_on = live is not None and self._live.get(id) is live  # asked first: it may end while it is read
                video = await asyncio.to_thread(self.get, id, owner)
                if video is None:
                    return
                yield video, None if live is None else live.progress
                if video.status in ("completed", "failed") or not goes_on:
                    return  # it has ended, or the engine has stopped and it is the next server's
                await woken.wait()
                woken.clear()
        finally:
            if live is not None:
                with self._turn:
                    live.listeners.remove(listener)

    def close(self) -> None:
        """Waits until what has ended is written down."""
        self._media.shutdown(wait=True)
        self._writer.shutdown(wait=True)


def _settled(request: VideoRequest, asked: Asked) -> dict[str, Any]:
    """The request with every choice made, so that it gives the same pixels whenever it runs."""
    kept = request.model_dump(exclude_none=True, include={"prompt", "negative_prompt", "guidance_scale", "user"})
    job = asked.job
    return kept | {
        "model": asked.model,
        "size": asked.size,
        "frames": job.frames,
        "fps": asked.fps,
        "seed": job.seeds[0],
        "plan": str(job.plan),
        "num_inference_steps": job.steps,
        "quality": asked.quality,
    }


def _wake(live: Live) -> None:
    for loop, event in live.listeners:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            loop.call_soon_threadsafe(event.set)


def _reason(error: BaseException | None) -> tuple[str, str]:
    if isinstance(error, CancelledError):
        return "cancelled", "the job was cancelled"
    if isinstance(error, UserError | QueueFullError):
        return "invalid_request_error", str(error)
    return "server_error", f"the job failed: {type(error).__name__}"


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _files(sample: Sample, fps: int) -> Mapping[str, bytes]:
    """The video, its first frame, and some of its frames on a sheet."""
    with tempfile.TemporaryDirectory() as folder:
        video, sheet = Path(folder) / VIDEO, Path(folder) / "sheet.png"
        media.save(video, sample.frames, fps, sample.metadata)
        contact_sheet(sample.frames, sample.metadata["prompt"], sheet)
        thumbnail, spritesheet = io.BytesIO(), io.BytesIO()
        Image.fromarray(sample.frames[0]).save(thumbnail, "WEBP")
        Image.open(sheet).convert("RGB").save(spritesheet, "JPEG", quality=90)
        return {VIDEO: video.read_bytes(), THUMBNAIL: thumbnail.getvalue(), SHEET: spritesheet.getvalue()}
