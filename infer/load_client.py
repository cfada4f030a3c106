"""One request of a load test, from its sending to its result, and whether that is what it should be."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from infer.load_bad import IMAGES, VIDEOS, bad_call, png
from infer.load_mix import Arrival

Outcome = Literal["ok", "cancelled", "refused", "full", "error"]
OUTCOMES: Mapping[Outcome, str] = {
    "ok": "answered",
    "cancelled": "cancelled as asked",
    "refused": "refused because malformed",
    "full": "refused with 429",
    "error": "errors",
}
POLL = 0.5  # seconds between two looks at a video
ENDED = ("completed", "failed")
IMAGE_BEGINNINGS = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF")


class FullError(Exception):
    """The server takes no more for now."""


class FaultError(Exception):
    """What came is not the client's fault."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """How a request ended: why, with which status where it was refused, and the seconds of its stages."""

    outcome: Outcome
    reason: str = ""
    status: int | None = None
    stages: Mapping[str, float] = field(default_factory=dict)


def connected(url: str, key: str | None) -> httpx.AsyncClient:
    """A client that holds nothing back: no bound on connections, no proxy, no time limit but the caller's."""
    # A server closes what is idle for 5 seconds; what is sent at that moment would look like its failure.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=100, keepalive_expiry=2.0)
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=None, trust_env=False)


async def ask(http: httpx.AsyncClient, arrival: Arrival, limit: float, patience: float | None) -> Answer:
    """Sends a request and waits for its end, at most `limit` seconds; after `patience` seconds it is given up."""
    try:
        async with asyncio.timeout(limit):
            if arrival.bad is not None:
                return await _bad(http, arrival)
            return await (_video if arrival.kind.video else _image)(http, arrival, patience)
    except FullError:
        return Answer(outcome="full", status=429)
    except FaultError as error:
        return Answer(outcome="error", reason=str(error))
    except TimeoutError:
        return Answer(outcome="error", reason=f"no end within {limit:g} s")
    except httpx.HTTPError as error:
        return Answer(outcome="error", reason=f"broken connection: {type(error).__name__}")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        return Answer(outcome="error", reason=f"an answer that is not understood: {type(error).__name__} {error}"[:200])


def _checked(answer: httpx.Response) -> httpx.Response:
    """The answer, where it is a good one."""
    if answer.status_code == 429:
        if "retry-after" not in answer.headers:
            raise FaultError("a 429 without Retry-After")
        raise FullError
    if not answer.is_success:
        raise FaultError(f"{answer.status_code}: {_message(answer)}")
    return answer


def _message(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])[:200]
    except (ValueError, KeyError, TypeError):
        return answer.text[:200]


async def _bad(http: httpx.AsyncClient, arrival: Arrival) -> Answer:
    assert arrival.bad is not None
    answer = await http.request(**bad_call(arrival.bad, arrival.body(), arrival.kind.video))
    if 400 <= answer.status_code < 500 and answer.status_code != 429:
        return Answer(outcome="refused", status=answer.status_code)
    try:
        _checked(answer)
    except FaultError as error:
        raise FaultError(f"{arrival.bad} got a {error}") from None
    raise FaultError(f"{arrival.bad} was accepted with a {answer.status_code}")


async def _image(http: httpx.AsyncClient, arrival: Arrival, patience: float | None) -> Answer:
    try:
        async with asyncio.timeout(patience):
            if arrival.way == "stream":
                told = await _streamed(http, arrival)
                picture = told
            else:
                told = _checked(await http.post(IMAGES, json=arrival.body())).json()
                (picture,) = told["data"]
            if arrival.way == "url":
                data = _checked(await http.get(picture["url"])).content
            else:
                data = _decoded(picture["b64_json"])
    except TimeoutError:
        return Answer(outcome="cancelled")
    if not data.startswith(IMAGE_BEGINNINGS):
        raise FaultError(f"an image of {len(data)} bytes that is none")
    return Answer(outcome="ok", stages=told.get("timings") or {})


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        raise FaultError("an image that is no base64") from None


async def _streamed(http: httpx.AsyncClient, arrival: Arrival) -> dict[str, Any]:
    """The event with the finished image."""
    last = None
    async with http.stream("POST", IMAGES, json=arrival.body()) as answer:
        async for event in _events(answer):
            last = event
    if last is None or last["type"] != "image_generation.completed":
        raise FaultError(f"a stream that ended without an image, but with {last and last['type']}")
    return last


async def _events(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """What a server sends of its own accord; each event is one line of JSON."""
    if not answer.is_success:
        await answer.aread()
    _checked(answer)
    async for line in answer.aiter_lines():
        if line.startswith("data:") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data:"))


async def _video(http: httpx.AsyncClient, arrival: Arrival, patience: float | None) -> Answer:
    video = _checked(await _create(http, arrival)).json()
    path = f"{VIDEOS}/{video['id']}"
    given_up = False
    try:
        async with asyncio.timeout(patience):
            video = await _ended(http, path, arrival)
    except TimeoutError:
        given_up = True
        _checked(await http.post(path + "/cancel"))
        video = await _ended(http, path, arrival)
    if video["status"] == "failed":
        error = video.get("error") or {}
        if given_up and error.get("code") == "cancelled":
            return Answer(outcome="cancelled")
        raise FaultError(f"a job failed: {error.get('code')}: {error.get('message', 'no reason is given')}")
    content = _checked(await http.get(path + "/content")).content
    if content[4:8] != b"ftyp":
        raise FaultError(f"the content of a completed job has {len(content)} bytes and is no MP4")
    if arrival.forget:
        _checked(await http.delete(path))
    return Answer(outcome="ok", stages=video.get("timings") or {})


async def _create(http: httpx.AsyncClient, arrival: Arrival) -> httpx.Response:
    body = arrival.body()
    if not (arrival.form or arrival.reference):
        return await http.post(VIDEOS, json=body)
    form: dict[str, Any] = {name: (None, str(value)) for name, value in body.items()}
    if arrival.reference:
        form["input_reference"] = ("first.png", png(arrival.kind.size), "image/png")
    return await http.post(VIDEOS, files=form)


async def _ended(http: httpx.AsyncClient, path: str, arrival: Arrival) -> dict[str, Any]:
    """The job, once it has ended."""
    if arrival.way == "poll":
        while (video := _checked(await http.get(path)).json())["status"] not in ENDED:
            await asyncio.sleep(POLL)
        return video
    video = {}
    async with http.stream("GET", path + "/events") as answer:
        async for event in _events(answer):
            video = event["video"]
    if video.get("status") not in ENDED:
        raise FaultError(f"the events of a job ended while it was {video.get('status')}")
    return video
