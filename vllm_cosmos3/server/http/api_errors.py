"""Errors as HTTP responses: the table from slugs to statuses, the envelope, the response to an exception.

`envelope_middleware` gives what other layers refuse the same shape; ``server.media_errors`` is of
vLLM's own routes, whose shape stays vLLM's.
"""

from __future__ import annotations

import errno
import logging
import math
import uuid
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from vllm_cosmos3.errors import LONGEST, Cosmos3Error, InvalidRequest, cut, file_error

logger = logging.getLogger(__name__)

STATUS = {  # every slug that is not a 400
    "authentication": 401,
    "path_not_allowed": 403,
    "permission_denied": 403,
    "not_found": 404,
    "model_not_found": 404,
    "cursor_not_found": 404,
    "method_not_allowed": 405,
    "request_timeout": 408,
    "not_ready": 409,
    "job_failed": 409,
    "idempotency_conflict": 409,
    "guardrails_unavailable": 409,
    "cancelled": 409,
    "expired": 410,
    "session_lost": 410,
    "field_too_large": 413,
    "payload_too_large": 413,
    "unsupported_media_type": 415,
    "upgrade_required": 426,
    "range_not_satisfiable": 416,
    "queue_full": 429,
    "internal_error": 500,
    "out_of_memory": 500,
    "not_implemented": 501,
    "worker_lost": 503,
    "interrupted": 503,
    "loading": 503,
    "draining": 503,
    "sleeping": 503,
    "guardrail_error": 503,
    "estimated_wait_exceeds_deadline": 503,
    "storage_unavailable": 503,
    "deadline_exceeded": 504,
    "storage_full": 507,
}
SERVER_FAILED = "the server failed; its log has the cause"
# Slugs of the package that are spelled differently in the API.
PUBLIC = {"busy": "queue_full", "worker_died": "worker_lost", "checkpoint": "internal_error"}


class ApiError(Cosmos3Error):
    """An error of the HTTP surface itself: a slug, a sentence, the field if there is one."""

    def __init__(
        self,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.code, self.param, self.headers = code, param, dict(headers or {})


class RequestFailed(ApiError):
    """A request that was accepted came to nothing: it was not refused."""


def slug(error: Cosmos3Error) -> str:
    """The public code of an error."""
    return PUBLIC.get(error.code, error.code)


def status_of(code: str) -> int:
    return STATUS.get(code, 400)


def error_body(code: str, message: str, param: str | None = None) -> dict[str, Any]:
    """The envelope that every error has, in the shape that OpenAI's clients read."""
    shown = "unsupported" if code == "not_implemented" else code
    kind = _kind(status_of(code))
    named = None if param is None else param[:LONGEST]
    texts = [text and text.encode(errors="backslashreplace").decode() for text in (message, named)]
    return {"error": {"message": texts[0], "type": kind, "param": texts[1], "code": shown}}


def envelope(error: Cosmos3Error) -> dict[str, Any]:
    """The envelope of one error."""
    param = None
    if isinstance(error, InvalidRequest):
        param = error.field
        # The name may be the client's, who may send megabytes.
        error = InvalidRequest(cut(param), error.value, error.possible, error.code)
    elif isinstance(error, ApiError):
        param = error.param
    return error_body(slug(error), str(error), param)


def error_response(error: Cosmos3Error, status: int | None = None) -> JSONResponse:
    """The answer to a request that ended with ``error``; its code says with which status."""
    headers = error.headers if isinstance(error, ApiError) else {}
    status = status or status_of(slug(error))
    if status == HTTPStatus.TOO_MANY_REQUESTS or status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers = {"Retry-After": "5", **headers}
    if status == HTTPStatus.NOT_IMPLEMENTED:
        headers = {
            "x-should-retry": "false",
            **headers,
        }  # OpenAI's clients repeat what fails with 5xx
    return JSONResponse(envelope(error), status, headers)


def retry_after(seconds: float) -> str:
    """The header of that name: whole seconds until it is worth to ask again, an hour at most."""
    return str(min(max(1, math.ceil(seconds)), 3600))


def api_error(error: Exception, request: Request) -> Cosmos3Error:
    """What a client is told of an exception that left a route; the log has what it is not told."""
    match error:
        case Cosmos3Error():
            return error
        case HTTPException(__cause__=(ClientDisconnect() | RecursionError()) as cause):
            return api_error(cause, request)
        case HTTPException(status_code=400):  # FastAPI's, of a body that it reads
            return ApiError("invalid_json", "the body is not JSON in UTF-8")
        case RequestValidationError():  # of the query, or of a body that FastAPI reads
            first = error.errors()[0]
            if first["type"] == "json_invalid":
                said = (
                    f"the body is not JSON at character {first['loc'][-1]}: {first['ctx']['error']}"
                )
                return ApiError("invalid_json", said)
            name = str(first["loc"][-1])
            return ApiError("invalid_value", f"{name}: {first['msg']}", param=name)
        case ClientDisconnect():
            return RequestFailed("cancelled", "the client went away")
        case RecursionError():
            return ApiError("invalid_value", "the body is nested too deeply")
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):  # of an upload, or what it becomes
            return file_error(error)
        case _:
            logger.error("%s %s", request.method, request.url.path, exc_info=error)
            return RequestFailed("internal_error", SERVER_FAILED)


def request_id(headers: Mapping[str, str]) -> str:
    """The client's name for its request, or a new one."""
    return headers.get("x-request-id") or uuid.uuid4().hex


def _kind(status: int) -> str:
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    return kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
