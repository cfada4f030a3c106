"""Bodies of requests, read no further than they may be long."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import json
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from dit_jax.config import UserError
from infer.api_types import VideoRequest
from infer.uploads import UploadLimits, read_reference

TEXT = 2**18  # bytes of a body without a file
PATIENCE = 120.0  # seconds until a body has to be there
REFERENCE = "input_reference"
PARTS = 100  # objects and lists in a body
_UPLOADS = asyncio.Semaphore(4)  # bodies at once that may hold a file, and so take much memory
_DECODING = asyncio.Semaphore(2)  # uploads that are decoded at once: each may take as much memory as its limits allow
Model = TypeVar("Model", bound=BaseModel)


async def body_of(request: Request, limit: int) -> bytes:
    """The body; 413 as soon as it is known to be longer than `limit` bytes, 408 when it takes too long to come."""
    told = request.headers.get("content-length", "0")
    if told.isdigit() and int(told) > limit:
        raise HTTPException(413, f"the body has {told} bytes: expected at most {limit}; send less")
    parts, length = [], 0
    try:
        async with asyncio.timeout(PATIENCE):
            async for part in request.stream():
                length += len(part)
                if length > limit:
                    raise HTTPException(
                        413, f"the body has more than {limit} bytes: expected at most {limit}; send less"
                    )
                parts.append(part)
    except TimeoutError:
        raise HTTPException(
            408, f"the body was not there after {PATIENCE:g} s, only {length} bytes: send it faster"
        ) from None
    return b"".join(parts)


async def read_json(request: Request, model: type[Model], limit: int = TEXT) -> Model:
    """A JSON body as this model; ValidationError or UserError for one that is not."""
    return model.model_validate(_object(await body_of(request, limit)))


async def read_video_request(request: Request, limits: UploadLimits) -> tuple[VideoRequest, Any]:
    """What `POST /v1/videos` is asked, as JSON or as a form, and the picture that came with it (or None)."""
    length = request.headers.get("content-length", "")
    short = length.isdigit() and int(length) <= TEXT
    async with contextlib.nullcontext() if short else _UPLOADS:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "multipart/form-data":
            told, reference = await _form(request, limits)
        else:
            told = _object(await body_of(request, TEXT + limits.bytes * 4 // 3))
            reference = _in_json(told.pop(REFERENCE, None), limits)
        asked = VideoRequest.model_validate(told)
        if reference is None:
            return asked, None
        async with _DECODING:
            return asked, await run_in_threadpool(read_reference, reference, limits)


async def _form(request: Request, limits: UploadLimits) -> tuple[dict[str, Any], bytes | None]:
    whole = await body_of(request, TEXT + limits.bytes)

    async def again() -> dict[str, Any]:
        return {"type": "http.request", "body": whole, "more_body": False}

    try:
        async with Request(request.scope, again).form(max_files=1, max_fields=40, max_part_size=TEXT) as parts:
            return await _parts(parts, limits)
    except UnicodeError:
        raise UserError("the form is written in no known way: expected UTF-8; send it so") from None


async def _parts(parts: FormData, limits: UploadLimits) -> tuple[dict[str, Any], bytes | None]:
    told: dict[str, Any] = {}
    reference = None
    for name, value in parts.multi_items():
        if isinstance(value, UploadFile):
            if name != REFERENCE:
                raise UserError(f"a file was sent as {name!r}: expected {REFERENCE!r}; name it so")
            reference = await value.read()
        elif name in told:
            raise UserError(f"{name!r} was sent twice: expected it once; leave one out")
        else:
            told[name] = value
    if reference is None:
        reference = _in_json(told.pop(REFERENCE, None), limits)
    elif REFERENCE in told:
        raise UserError(f"{REFERENCE} was sent twice: expected it once; leave one out")
    return told, reference


def _object(body: bytes) -> dict[str, Any]:
    if body.count(b"[") + body.count(b"{") > PARTS:
        raise UserError(f"the body holds more than {PARTS} objects and lists: expected one object; send less")
    try:
        told = json.loads(body)
    except (ValueError, RecursionError):
        raise UserError('the body is no JSON: expected one object, such as {"prompt": "…"}; mend it') from None
    if not isinstance(told, dict):
        raise UserError(f"the body is a JSON {type(told).__name__}: expected an object with a prompt; mend it")
    return told


def _in_json(reference: Any, limits: UploadLimits) -> bytes | None:
    """The bytes of a data URL: this server fetches nothing from anywhere."""
    if reference is None:
        return None
    url = reference.get("image_url") if isinstance(reference, dict) else reference
    remedy = f"send a file as {REFERENCE} in a form, or a data URL with base64"
    if not isinstance(url, str) or not url.startswith("data:"):
        raise UserError(f"{REFERENCE} is no picture: this server fetches no URLs and has no files; {remedy}")
    head, _, data = url.partition(",")
    if not head.endswith(";base64") or len(data) > limits.bytes * 4 // 3 + 4:
        raise UserError(f"{REFERENCE} is not understood: expected base64 of at most {limits.bytes} bytes; {remedy}")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise UserError(f"{REFERENCE} is not understood: expected base64; {remedy}") from None
