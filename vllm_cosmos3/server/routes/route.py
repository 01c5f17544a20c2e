"""Base of all routes: how they find the service, and how their errors leave."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from vllm_cosmos3.server.http.api_errors import (
    ApiError,
    RequestFailed,
    api_error,
    error_response,
    request_id,
)
from vllm_cosmos3.server.http.metrics import metrics
from vllm_cosmos3.server.jobs.service import Service


class Route(APIRoute):
    """A route whose errors have our envelope in any app, and whose responses have a request id.

    Every request for something to be made that is refused is counted here.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                self.check(request)
                response: Response = await handle(request)
            except Exception as raised:  # noqa: BLE001 - logged, and answered
                error = api_error(raised, request)
                if request.method == "POST" and not isinstance(error, RequestFailed):
                    metrics().refused(error)
                response = error_response(error)
            response.headers["x-request-id"] = request_id(request.headers)
            return response

        return handler

    def check(self, request: Request) -> None:
        """Refuse a request before anything of its body is read; the routes that do say so here."""


def service_of(request: Request) -> Service:
    """The service of the app that serves this request.

    Raises:
        ApiError: it is not there yet.
    """
    found: Service | None = request.app.state.cosmos3
    if found is None:
        raise ApiError("loading", "the generator is loading")
    return found
