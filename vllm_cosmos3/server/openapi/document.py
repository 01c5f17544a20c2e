"""The OpenAPI page as a whole: what it is called, how its groups are sorted, and how keys are sent."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from vllm_cosmos3.version import __version__

DESCRIPTION = """\
NVIDIA Cosmos 3 behind OpenAI's API: videos and images by the generator and, in a server with a reasoner, chat about
pictures and videos. `/` is a page to try the models in.

Each form of a request has an example that can be sent as it is. Names of other servers are accepted as well, such as
`num_steps` for `num_inference_steps`; what is not listed is refused, with the nearest name.
"""
TAGS = {
    "Cosmos3 videos": "Jobs that make videos, their events and their files.",
    "Cosmos3 images": "Pictures, made while the client waits.",
    "Cosmos3 server": "What the checkpoint can do, and whether it can be asked now.",
    "Cosmos3 robots": "Policies for robots, over a WebSocket.",
}


def describe(app: FastAPI) -> None:
    """Give the app's page our words, and a place to enter a key where one is needed."""
    app.title, app.version, app.description = "vllm-cosmos3", __version__, DESCRIPTION
    app.openapi_tags = [{"name": name, "description": text} for name, text in TAGS.items()]
    make = app.openapi

    def openapi() -> dict[str, Any]:
        page = make()
        if getattr(app.state, "cosmos3_keys", None):
            schemes = page.setdefault("components", {}).setdefault("securitySchemes", {})
            schemes["key"] = {"type": "http", "scheme": "bearer"}
            page["security"] = [{"key": []}]
        return page

    app.openapi = openapi  # type: ignore[method-assign]
