"""API keys: who may use what is under /v1, and the robots' connections."""

from __future__ import annotations

import hashlib
import os
import secrets
from argparse import Namespace

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from vllm_cosmos3.server.http.api_errors import error_body

BEARER, API_KEY = "bearer", "api-key"
SCHEMES = {"http": (BEARER,), "websocket": (BEARER, API_KEY)}  # that are admitted
# Of vLLM too, some of whose routes stand beside ours.
GUARDED = ("/v1", "/v2", "/inference", "/cohere")
VLLM_UNAUTHORIZED = {"error": "Unauthorized"}  # what vLLM answers without a key


class Keys:
    """The keys of a server; without any, everybody is let in."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        """Whether a key is needed."""
        return bool(self._digests)

    def admit(self, scope: Scope, *schemes: str) -> bool:
        """Whether the Authorization header has one of ``schemes`` and a key."""
        if not self._digests:
            return True
        scheme, token = _authorization(scope)
        digest = hashlib.sha256(token).digest()
        known = [secrets.compare_digest(digest, each) for each in self._digests]
        return scheme in schemes and any(known)


class ApiKeys:
    """Middleware that asks for a key on everything under /v1, like vLLM's.

    The keys are those of the app's state, which may be known later than its middleware.
    ``unauthorized`` is the body of a refusal, by default our envelope.
    """

    def __init__(self, app: ASGIApp, unauthorized: object = None) -> None:
        self._app, self._unauthorized = app, unauthorized

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in SCHEMES or scope.get("method") == "OPTIONS":
            await self._app(scope, receive, send)
            return
        # As the path came, and as routes are found by it, whatever the root path is.
        guarded = any(path.startswith(GUARDED) for path in (scope["path"], path_of(scope)))
        keys = self._keys(scope)
        if not guarded or keys is None or keys.admit(scope, *SCHEMES[scope["type"]]):
            await self._app(scope, receive, send)
        else:
            await refused(scope["type"], self._unauthorized)(scope, receive, send)

    def _keys(self, scope: Scope) -> Keys | None:
        found: Keys | None = getattr(scope["app"].state, "cosmos3_keys", None)
        return found


class ReasonerKeys(ApiKeys):
    """The same for vLLM's app without a generator: ``--middleware``, in front of vLLM's own.

    That one takes the root path off without regard to slashes: where it is "/", no key is asked for.
    """

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(app, VLLM_UNAUTHORIZED)

    def _keys(self, scope: Scope) -> Keys:
        state = scope["app"].state
        if not hasattr(state, "cosmos3_keys"):
            state.cosmos3_keys = keys_of(state.args)
        keys: Keys = state.cosmos3_keys
        return keys


def keys_of(args: Namespace) -> Keys:
    """The keys that ``vllm serve`` was given, by its flag or in the environment."""
    keys = args.api_key or [os.environ.get("VLLM_API_KEY", "")]
    return Keys(tuple(key for key in keys if key))


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
    """The path by which routes are found: it may come with the prefix of a proxy.

    As Starlette's router has it, a prefix ends where a slash follows.
    """
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    rest = path.removeprefix(root)
    return rest if not rest or rest.startswith("/") else path


def refused(kind: str, body: object = None) -> JSONResponse:
    """The response to a request without a key; ``kind`` is http or websocket."""
    schemes = " or ".join(repr(scheme.title()) for scheme in SCHEMES[kind])
    message = f"the Authorization header must be {schemes} and an API key of this server"
    body = body or error_body("authentication", message)
    return JSONResponse(body, 401, {"WWW-Authenticate": "Bearer"})


def _authorization(scope: Scope) -> tuple[str, bytes]:
    given: bytes = dict(scope["headers"]).get(b"authorization", b"")
    scheme, _, token = given.partition(b" ")
    return scheme.decode("latin-1").lower(), token.strip()
