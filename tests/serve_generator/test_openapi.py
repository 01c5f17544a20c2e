"""The OpenAPI page is true: what the server answers and accepts is what the page says."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from generators import LONG, PICTURE, create, eventually, finished, suspended
from jsonschema import Draft202012Validator
from limits import HANG
from servers import Server
from test_catalogue import IMAGES, ROWS, SMALL, VIDEOS

from vllm_cosmos3.server.openapi.requests import image_request, video_request

pytestmark = pytest.mark.serve
Page = dict[str, Any]
ONE = f"{VIDEOS}/{{video_id}}"


@pytest.fixture(scope="module")
def page(generator_server: Server) -> Page:
    found: Page = httpx.get(f"{generator_server.url}/openapi.json").json()
    return found


def content(page: Page, path: str, method: str, status: str = "200") -> dict[str, Any]:
    found: dict[str, Any] = page["paths"][path][method]["responses"][status]["content"]
    return found


def check(page: Page, answer: httpx.Response, path: str, method: str = "get") -> Any:
    """The JSON of an answer, after a look at whether it is as the page says."""
    status = "200" if answer.status_code == 200 else "default"
    schema = content(page, path, method, status)["application/json"]["schema"]
    schema = {**schema, "components": page["components"]}  # which it refers to
    Draft202012Validator.check_schema(schema)
    Draft202012Validator(schema).validate(answer.json())
    return answer.json()


def test_jobs_are_as_described(page: Page, generator_server: Server) -> None:
    url = f"{generator_server.url}{VIDEOS}"
    send = {"prompt": "a boat", **LONG}
    with suspended(generator_server):  # the second is answered before the first has made a step
        jobs = [
            check(page, httpx.post(url, json=send | {"seed": seed}, timeout=HANG), VIDEOS, "post")
            for seed in range(3)
        ]
    late = create(generator_server, **LONG, deadline_seconds=0.01)
    eventually(lambda: httpx.get(f"{url}/{jobs[0]['id']}").json()["cosmos3"]["step"] > 0)
    eventually(lambda: httpx.get(f"{url}/{late['id']}").json()["status"] == "failed")
    now = [check(page, httpx.get(f"{url}/{job['id']}"), ONE) for job in (*jobs, late)]
    assert {job["status"] for job in (*jobs, *now)} == {"queued", "in_progress", "failed"}
    check(page, httpx.get(url), VIDEOS)
    for job in now:
        check(page, httpx.delete(f"{url}/{job['id']}", timeout=HANG), ONE, "delete")
    done = finished(generator_server, create(generator_server, **SMALL))
    assert done["status"] == "completed"
    check(page, httpx.get(f"{url}/{done['id']}"), ONE)
    check(page, httpx.get(url, params={"limit": 1}), VIDEOS)


def test_the_other_answers_are_as_described(page: Page, generator_server: Server) -> None:
    base = generator_server.url
    for method, path, shown in (
        ("GET", f"{VIDEOS}/nope", ONE), ("DELETE", f"{VIDEOS}/nope", ONE),
        ("GET", f"{VIDEOS}/nope/content", f"{ONE}/content"), ("POST", VIDEOS, VIDEOS),
    ):  # fmt: skip
        answer = httpx.request(method, f"{base}{path}")
        assert answer.status_code >= 400
        check(page, answer, shown, method.lower())
    pictures = httpx.post(f"{base}{IMAGES}", json={"prompt": "a boat", **PICTURE}, timeout=HANG)
    check(page, pictures, IMAGES, "post")
    check(page, httpx.get(f"{base}/v1/models"), "/v1/models")
    check(page, httpx.get(f"{base}/v1/cosmos3/models"), "/v1/cosmos3/models")


def test_types_of_content_and_parameters(page: Page) -> None:
    assert content(page, f"{ONE}/events", "get").keys() == {"text/event-stream"}
    assert content(page, "/metrics", "get").keys() == {"text/plain"}
    assert content(page, f"{ONE}/content", "get").keys() == {"video/mp4", "image/webp"}
    assert content(page, f"{VIDEOS}/sync", "post").keys() == {"video/mp4"}
    assert f"{VIDEOS}/edits" not in page["paths"]  # not offered
    for path, methods in page["paths"].items():
        for name, method in methods.items():
            assert "422" not in method["responses"], (path, name)
            assert " " in method["summary"], (path, name)
            for parameter in method.get("parameters", ()):
                assert parameter["description"], (path, name)
    headers = {
        path: {each["name"] for each in page["paths"][path]["post"]["parameters"]}
        for path in (VIDEOS, f"{VIDEOS}/sync", f"{ONE}/remix")
    }
    assert headers == {
        VIDEOS: {"Idempotency-Key", "Prefer"},
        f"{VIDEOS}/sync": {"Idempotency-Key"},
        f"{ONE}/remix": {"Idempotency-Key", "Prefer", "video_id"},
    }
    (limit,) = (p for p in page["paths"][VIDEOS]["get"]["parameters"] if p["name"] == "limit")
    assert limit["schema"]["type"] == "integer"
    assert limit["schema"]["default"] == 20


VIDEO, IMAGE = (
    Draft202012Validator(made["requestBody"]["content"]["application/json"]["schema"])
    for made in (video_request(), image_request())
)


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.status == 200 and "json" in row.send], ids=str
)
def test_accepted_bodies_are_described(row: Any) -> None:
    (IMAGE if row.path == IMAGES else VIDEO).validate(row.send["json"])


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt_token_ids": [1, 2]}, {"prompt": None, "prompt_token_ids": [1]}, {"extra_args": {}},
        {"user": "me"}, {"num_steps": 5}, {"size": "auto"}, {"seed": None}, {"seconds": "4"},
        {"stream": False}, {"edge": True, "control_guidance_interval": [0, 1000]}, {"n": 1},
        {"input_reference": {"image_url": "data:"}}, {"image_size": 480}, {"guidance": 3},
    ],
)  # fmt: skip
def test_other_spellings_are_described(fields: dict[str, Any]) -> None:
    VIDEO.validate(fields)
    if not fields.keys() & {"edge", "input_reference", "image_size", "seconds"}:
        IMAGE.validate(fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"guidance_interval": [0, 1002]}, {"control_guidance_interval": [-1, 5]}, {"n": 2},
        {"condition_frame_indexes_vision": [1001]}, {"prompt_token_ids": [-1]}, {"seed": 1.5},
        {"domain_name": "x" * 101}, {"prompt": "x" * (2**20 + 1)}, {"prompt_token_ids": []},
        {"action": [[]]}, {"num_frames": 1},
    ],
)  # fmt: skip
def test_what_is_refused_is_described(fields: dict[str, Any]) -> None:
    assert not VIDEO.is_valid({"prompt": "a", **fields})
