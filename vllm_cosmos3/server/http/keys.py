"""API keys: who may use what is under /v1, and the robots' connections."""

from __future__ import annotations

import hashlib
import secrets

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from vllm_cosmos3.server.http.api_errors import error_body

BEARER, API_KEY = "bearer", "api-key"


class Keys:
    """The keys of a server; without any, everybody is let in."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def admit(self, scope: Scope, *schemes: str) -> bool:
        """Whether the Authorization header has one of ``schemes`` and a key."""
        if not self._digests:
            return True
        scheme, token = _authorization(scope)
        digest = hashlib.sha256(token).digest()
        known = [secrets.compare_digest(digest, each) for each in self._digests]
        return scheme in schemes and any(known)


class ApiKeys:
    """Middleware that asks for a bearer token on everything under /v1, like vLLM's.

    The robots' connections are asked by their endpoint.
    """

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self._app, self._keys = app, Keys(keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        guarded = scope["type"] == "http" and path_of(scope).startswith("/v1")
        if guarded and scope["method"] != "OPTIONS" and not self._keys.admit(scope, BEARER):
            response = refused("the Authorization header must be 'Bearer' and an API key")
            await response(scope, receive, send)
        else:
            await self._app(scope, receive, send)


class AnyScheme:
    """Middleware for vLLM's app: ``Api-Key KEY`` of a WebSocket is what ``Bearer KEY`` is."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            scheme, token = _authorization(scope)
            if scheme == API_KEY:
                headers = [pair for pair in scope["headers"] if pair[0] != b"authorization"]
                scope = {**scope, "headers": [*headers, (b"authorization", b"Bearer " + token)]}
        await self._app(scope, receive, send)


def path_of(scope: Scope) -> str:
    """The path by which routes are found: it may come with the prefix of a proxy."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def refused(message: str) -> JSONResponse:
    """The answer to a request without a key; it may be that to a WebSocket's handshake."""
    body = error_body("authentication", f"{message} of this server")
    return JSONResponse(body, 401, {"WWW-Authenticate": "Bearer"})


def _authorization(scope: Scope) -> tuple[str, bytes]:
    given: bytes = dict(scope["headers"]).get(b"authorization", b"")
    scheme, _, token = given.partition(b" ")
    return scheme.decode("latin-1").lower(), token.strip()
