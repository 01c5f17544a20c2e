"""API keys in front of an app: what is under /v1 is asked for one, whatever a proxy's prefix is."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

import pytest
from fastapi import FastAPI, WebSocket
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from vllm_cosmos3.server.app import Listen, make_app
from vllm_cosmos3.server.http.keys import ApiKeys, Keys, ReasonerKeys

ROOTS = (
    "",
    "/",
    "/v",
    "/v1",
    "/v1/",
    "/v1/v",
    "/v1/videos",
    "/api",
    "/api/",
    "//",
    "/v1/../",
    "v1",
)


@pytest.mark.parametrize("prefix", ["", "/proxy"])
@pytest.mark.parametrize(("key", "status"), [(None, 401), ("wrong", 401), ("right", 200)])
def test_a_prefix_is_no_way_round(prefix: str, key: str | None, status: int) -> None:
    app = FastAPI(root_path=prefix)
    app.get("/v1/things")(lambda: "a thing")
    app.get("/health")(lambda: "well")
    app.add_middleware(ApiKeys)
    app.state.cosmos3_keys = Keys(("right",))
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    client = TestClient(app, root_path=prefix)
    for path in {"/v1/things", f"{prefix}/v1/things"}:
        assert client.get(path, headers=headers).status_code == status
    assert client.get("/health").status_code == 200


def spellings(root: str) -> Iterator[str]:
    """Paths by which something may find a route below /v1."""
    for path in (
        "/v1/videos",
        "/%761/videos",
        "/v1%2Fvideos",
        "/v1/videos/x/content",
        "/v1/models/x",
    ):
        yield path
        yield f"{root}{path}"
        yield f"{root.rstrip('/')}{path}"
        yield f"{root}{root}{path}"


@pytest.mark.parametrize("root", ROOTS)
def test_no_root_path_and_no_spelling_lets_anybody_in(root: str) -> None:
    """Without its lifespan the app has no service: who is let in hears 503 and no 401."""
    app = make_app(lambda: None, Listen(api_keys=("secret",), root_path=root))  # type: ignore[arg-type, return-value]
    client = TestClient(app, raise_server_exceptions=False)
    for path in {path for path in spellings(root) if path.startswith("/")}:
        for method in ("GET", "HEAD", "POST", "DELETE", "PUT", "PATCH"):
            answer = client.request(method, f"http://testserver{path}")
            assert answer.status_code in (401, 404), (method, path)
    for method in ("GET", "POST", "DELETE"):
        assert client.request(method, "/v1/videos").status_code == 401
        key = {"Authorization": "Bearer secret"}
        assert client.request(method, "/v1/videos", headers=key).status_code != 401


@pytest.mark.parametrize("root", ROOTS)
def test_keys_of_the_reasoner_alone(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are those of vLLM's flag, or of the environment, and asked for before vLLM asks."""
    app = FastAPI(root_path=root)
    app.post("/v1/chat/completions")(lambda: "chat")
    app.get("/health")(lambda: "well")

    @app.websocket("/v1/realtime")
    async def realtime(socket: WebSocket) -> None:
        await socket.accept()
        await socket.close()

    app.add_middleware(ReasonerKeys)
    app.state.args = Namespace(api_key=["right", "other"])
    client = TestClient(app)
    for key in (None, "wrong", "other"):
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        answer = client.post("/v1/chat/completions", headers=headers)
        assert (answer.status_code == 401) == (key != "other")
        if key != "other":
            assert answer.json() == {"error": "Unauthorized"}
            with pytest.raises(WebSocketDisconnect), client.websocket_connect("/v1/realtime"):
                pass
    assert client.get("/health").status_code == 200
    monkeypatch.setenv("VLLM_API_KEY", "of the environment")
    app.state.args = Namespace(api_key=None)
    del app.state.cosmos3_keys
    assert client.post("/v1/chat/completions").status_code == 401
