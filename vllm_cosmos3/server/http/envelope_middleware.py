"""One shape for all errors below some paths, whoever answers: our routes, the router, or the host.

vLLM's app refuses keys, methods and unknown paths in shapes of its own. Around its whole stack this
middleware holds back answers with an error status and gives those that are not ours our envelope.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_cosmos3.server.http.api_errors import SERVER_FAILED, ApiError, error_response, request_id
from vllm_cosmos3.server.http.keys import path_of

# Headers of a replaced answer that stay, besides those for browsers.
KEPT = ("www-authenticate", "retry-after", "allow", "content-range", "vary", "x-request-id")
CROSS_ORIGIN = "access-control-"
LONGEST = 300  # characters of a reason that another layer gave


def wrap(app: FastAPI, layer: Callable[[ASGIApp], ASGIApp]) -> None:
    """Put a layer around all middleware, that which is added after this included.

    The outermost one of Starlette's is inside too: it answers what fails anywhere.
    """
    build = app.build_middleware_stack
    app.build_middleware_stack = lambda: layer(build())  # type: ignore[method-assign]


class EnvelopeMiddleware:
    """ASGI middleware for the paths that begin with one of ``prefixes``."""

    def __init__(self, app: ASGIApp, prefixes: tuple[str, ...]) -> None:
        self._app, self._prefixes = app, prefixes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not path_of(scope).startswith(self._prefixes):
            await self._app(scope, receive, send)
            return
        held: Message | None = None
        body = b""

        async def relay(message: Message) -> None:
            nonlocal held, body
            if message["type"] == "http.response.start" and message["status"] >= 400:
                held = message
            elif held is None:
                await send(message)
            else:
                body += message.get("body", b"")
                if not message.get("more_body", False):
                    await _answer(scope, held, body)(scope, receive, send)

        await self._app(scope, receive, relay)


def _answer(scope: Scope, start: Message, body: bytes) -> Response:
    """The held answer as it is if it has our shape, else one of the same status that has."""
    status, headers = start["status"], Headers(raw=start["headers"])
    if _is_ours(body):
        response = Response(body, status)
        response.raw_headers = list(start["headers"])
    else:
        kept = {
            name: value
            for name, value in headers.items()
            if name in KEPT or name.startswith(CROSS_ORIGIN)
        }
        response = error_response(_error(status, scope, kept, _reason(headers, body)), status)
    response.headers.setdefault("x-request-id", request_id(Headers(scope=scope)))
    return response


def _is_ours(body: bytes) -> bool:
    try:
        return isinstance(json.loads(body)["error"]["code"], str)
    except (ValueError, TypeError, LookupError):
        return False


def _reason(headers: Headers, body: bytes) -> str:
    """What a layer that answers in plain text says, in one line; nothing for other answers."""
    if not headers.get("content-type", "").startswith("text/plain"):
        return ""
    return " ".join(body.decode(errors="replace").split())[:LONGEST]


def _error(status: int, scope: Scope, headers: dict[str, Any], reason: str) -> ApiError:
    path = path_of(scope)
    code, message = {
        401: ("authentication", "the Authorization header must be 'Bearer' and a key of this server"),
        404: ("not_found", f"there is no {path} here; /docs lists what there is"),
        413: ("payload_too_large", "the request is larger than this server reads"),
        416: ("range_not_satisfiable", "the range is outside of the file"),
    }.get(status, ("invalid_value", f"{path} cannot be served like this{reason and ': '}{reason}"))  # fmt: skip
    if status == 401:
        headers["www-authenticate"] = "Bearer"  # once, whoever has said it already
    elif status == 405:
        headers.pop("allow", None)
        headers["Allow"] = _allowed(scope)
        code = "method_not_allowed"
        message = f"{scope['method']} is not allowed here, only {headers['Allow']}"
    elif status >= 500:
        code, message = "internal_error", SERVER_FAILED
    return ApiError(code, message, headers=headers)


def _allowed(scope: Scope) -> str:
    """The methods of all routes with this path; the router tells those of the first alone."""
    methods: set[str] = set()
    for route in scope["app"].routes:
        if route.matches(scope)[0] is Match.PARTIAL:
            methods |= route.methods
    return ", ".join(sorted(methods))
