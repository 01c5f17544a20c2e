"""The page at /, to try the models in, and /docs. Files of the package: no build step, nothing from elsewhere."""

from __future__ import annotations

import hashlib
import html
from functools import cache
from pathlib import Path

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response

from vllm_cosmos3.compat import swagger_ui
from vllm_cosmos3.server.http.api_errors import ApiError
from vllm_cosmos3.server.routes.route import Route, service_of
from vllm_cosmos3.version import __version__

router = APIRouter(route_class=Route, include_in_schema=False)
docs = APIRouter(route_class=Route, include_in_schema=False)

FOLDER = Path(__file__).parents[1] / "playground"
KINDS = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# What a browser may load on behalf of a page: scripts of this server alone, and none within the page.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'{styles}; img-src 'self' blob: data:; "
    "media-src 'self' blob:; connect-src 'self'; base-uri 'self'; form-action 'none'; "
    "frame-ancestors 'none'"
)
PAGE_POLICY = POLICY.format(styles="")
DOCS_POLICY = POLICY.format(styles=" 'unsafe-inline'")  # which Swagger UI writes
HEADERS = {
    "Cache-Control": "no-cache",  # asked for each time, answered with 304
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@router.get("/")
async def root(request: Request) -> Response:
    """The page for browsers, and what there is as JSON for everybody else."""
    shown = service_of(request).options.playground
    if shown and "text/html" in request.headers.get("accept", ""):
        return _page(request, "index.html", PAGE_POLICY)
    state = request.app.state
    facts = {
        "name": "vllm-cosmos3",
        "version": __version__,
        "surfaces": ["generator", *(["reasoner"] if state.cosmos3_engine is not None else [])],
        "key_needed": bool(state.cosmos3_keys),
        "links": {
            "models": "v1/cosmos3/models",
            "health": "health",
            **({"docs": "docs", "openapi": "openapi.json"} if request.app.openapi_url else {}),
        },
    }
    return JSONResponse(facts, headers={"Vary": "Accept"})


@router.get("/playground/{name}")
async def file(request: Request, name: str) -> Response:
    """A file of the page."""
    if not service_of(request).options.playground:
        raise ApiError("not_found", "this server was started with --no-playground")
    return _file(request, FOLDER, name)


@docs.get("/docs")
async def documentation(request: Request) -> Response:
    """The API as a page, with examples that can be sent."""
    return _page(request, "docs.html", DOCS_POLICY)


@docs.get("/docs/{name}")
async def documentation_file(request: Request, name: str) -> Response:
    """A file of that page: ours, or of Swagger UI, which vLLM brings along."""
    ours = name == "docs.js"
    return _file(request, FOLDER if ours else swagger_ui(), name)


def serve_docs(app: FastAPI) -> None:
    """Put /docs in place of the one that loads its scripts from a CDN, unless there is to be none."""
    if app.openapi_url is None:
        return
    app.router.routes[:] = [
        route
        for route in app.router.routes
        if getattr(route, "path", "") not in ("/docs", "/redoc")
    ]
    app.include_router(docs)


def _page(request: Request, name: str, policy: str) -> Response:
    """A page whose links are relative to the root path, whichever way it was reached."""
    base = html.escape(request.scope.get("root_path", "").rstrip("/") + "/")
    text = (FOLDER / name).read_text().replace("{base}", base)
    headers = {**HEADERS, "Content-Security-Policy": policy, "Vary": "Accept"}
    return Response(text, media_type=KINDS[".html"], headers=headers)


def _file(request: Request, folder: Path, name: str) -> Response:
    file = folder / name
    if name not in _names(folder) or file.suffix not in KINDS:
        raise ApiError("not_found", f"there is no file {name!r} here")
    data = file.read_bytes()
    tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
    headers = {**HEADERS, "ETag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(data, media_type=KINDS[file.suffix], headers=headers)


@cache
def _names(folder: Path) -> frozenset[str]:
    return frozenset(file.name for file in folder.iterdir())
