"""Statuses of the media's errors, in whatever way this vLLM takes them."""

from __future__ import annotations

from http import HTTPStatus

from vllm_cosmos3.compat import http_error
from vllm_cosmos3.errors import Busy, Cosmos3Error


def reply_of(error: Cosmos3Error) -> Exception:
    """The exception that vLLM answers with 413 or 429 where that is what ``error`` means, else itself.

    InvalidRequest is a ValueError, which vLLM answers with 400.
    """
    if isinstance(error, Busy):
        return http_error(HTTPStatus.TOO_MANY_REQUESTS, str(error))
    if error.code == "payload_too_large":
        return http_error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, str(error))
    return error
