"""What all routes have in common: how they find the service, and how their errors leave."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect

from vllm_cosmos3.errors import Cosmos3Error
from vllm_cosmos3.server.http.errors import ApiError, Failed, error_response
from vllm_cosmos3.server.http.metrics import metrics
from vllm_cosmos3.server.jobs.service import Service

logger = logging.getLogger(__name__)


class Route(APIRoute):
    """A route whose errors have our envelope in any app, and whose answers have a request id.

    Every request for something to be made that is refused is counted here.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                response: Response = await handle(request)
            except Cosmos3Error as error:
                if request.method == "POST" and not isinstance(error, Failed):
                    metrics().refused(error)
                response = error_response(error)
            except RequestValidationError as error:
                response = error_response(_of_query(error))
            except ClientDisconnect:
                response = error_response(ApiError("cancelled", "the client went away"))
            except RecursionError:
                deep = ApiError("invalid_value", "the body is nested too deeply")
                metrics().refused(deep)
                response = error_response(deep)
            except Exception as error:
                logger.error("%s %s", request.method, request.url.path, exc_info=error)
                response = error_response(
                    ApiError("internal_error", "the server failed; its log has the cause")
                )
            response.headers["x-request-id"] = request_id(request.headers)
            return response

        return handler


def request_id(headers: Mapping[str, str]) -> str:
    """The client's name for its request, or a new one."""
    return headers.get("x-request-id") or uuid.uuid4().hex


def service(request: Request) -> Service:
    """The service of the app that serves this request.

    Raises:
        ApiError: it is not there yet.
    """
    found: Service | None = request.app.state.cosmos3
    if found is None:
        raise ApiError("loading", "the generator is loading")
    return found


def _of_query(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    name = str(first["loc"][-1])
    return ApiError("invalid_value", f"{name}: {first['msg']}", param=name)
