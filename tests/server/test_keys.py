"""API keys in front of an app: what is under /v1 is asked for one, also behind a proxy's prefix."""

from __future__ import annotations

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from vllm_cosmos3.server.http.keys import ApiKeys, Keys


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
