"""What goes wrong, as answers that OpenAI's clients turn into their exceptions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from dit_jax.config import UserError
from infer.access import RateLimitError
from infer.api_types import Error, Failure
from infer.tickets import CancelledError, QueueFullError, StoppedError


def failure(status: int, message: str, kind: str, *, code: str | None = None, param: str | None = None, **headers: str):
    """An answer that OpenAI's clients turn into their exceptions."""
    body = Failure(error=Error(message=message, type=kind, code=code, param=param))
    return JSONResponse(body.model_dump(), status, headers=headers or None)


def too_soon(error: QueueFullError | RateLimitError) -> JSONResponse:
    """The answer to who has to wait."""
    return failure(
        429, str(error), "rate_limit_error", code="rate_limit_exceeded", **{"Retry-After": f"{error.retry_after:.0f}"}
    )


def handle_errors(app: FastAPI) -> None:
    """Turns what is raised into answers."""

    def handled(kind: type[Exception], answer: Callable[[Any], Response]) -> None:
        async def handler(_: Request, error: Any) -> Response:
            return answer(error)

        app.add_exception_handler(kind, handler)

    handled(UserError, lambda error: failure(400, str(error), "invalid_request_error"))
    handled(QueueFullError, too_soon)
    handled(RateLimitError, too_soon)
    handled(ClientDisconnect, lambda error: failure(499, "the client is gone", "invalid_request_error"))
    handled(StoppedError, lambda error: failure(503, str(error), "server_error", **{"Retry-After": "10"}))
    handled(CancelledError, lambda error: failure(409, "the request was cancelled", "invalid_request_error"))
    handled(RequestValidationError, _invalid)
    handled(ValidationError, _invalid)
    handled(HTTPException, lambda error: failure(error.status_code, str(error.detail), "invalid_request_error"))
    handled(Exception, lambda error: failure(500, "the server failed; see its log", "server_error"))


def _invalid(error: RequestValidationError | ValidationError) -> JSONResponse:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    found = f", found {_shown(first.get('input'))}" if place else ""
    message = f"{place or 'the request'}: {first['msg'].lower()}{found}; change it"
    return failure(400, message, "invalid_request_error", param=place or None)


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return repr(value[:80])
    return str(value) if isinstance(value, int | float | None) else f"a {type(value).__name__}"
