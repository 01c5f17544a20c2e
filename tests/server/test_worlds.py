"""The WebSocket of simulators, with a real stage behind it: frames, turns, and what goes wrong."""

from __future__ import annotations

import io
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from limits import HANG
from PIL import Image
from ranks import by_age, processes_below
from rollouts import PICTURE
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from vllm_cosmos3 import Cosmos3
from vllm_cosmos3.checkpoint.synthetic import write_checkpoint
from vllm_cosmos3.server.app import Listen, make_app
from vllm_cosmos3.server.frame_check import CHECKER
from vllm_cosmos3.server.guardrails import Guardrails
from vllm_cosmos3.server.jobs.service import Service
from vllm_cosmos3.server.memory_split import sized
from vllm_cosmos3.server.options import Options

PATH = "/v1/realtime_video/generate"
CHECKERS = Path(__file__).parents[1] / "serve_generator"
ROWS = np.random.RandomState(2).standard_normal((16, 59)).astype(np.float32)


def png() -> bytes:
    data = io.BytesIO()
    Image.fromarray(PICTURE).save(data, "png")
    return data.getvalue()


INIT = {
    "type": "init",
    "prompt": "A robot arm",
    "size": "48x64",
    "seed": 5,
    "first_frame": png(),
    "realtime_causal_kv_cache_num_frames": 6,
    "max_chunks": 2,
    "condition_inputs": {"action_rows": ROWS.tolist()},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("simulator") / "tiny"
    write_checkpoint(folder, kind="sim-bimanual", dtype="float32")
    return folder


@pytest.fixture(scope="module")
def client(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """An app in this process, and a stage in processes of its own. Its guardrails turn frames into negatives."""
    storage = str(tmp_path_factory.mktemp("storage"))
    engine = {"dtype": "float32"}
    options = Options(
        storage_path=storage,
        max_sessions=2,
        guardrail_checker="checkers:Words",
        engine=engine,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(CHECKERS))  # which the stage's processes get
        patch.delenv(CHECKER, raising=False)
        sizing, guardrails = sized(checkpoint, options, "cpu"), Guardrails(options)
        assert guardrails.state == "active"
        app = make_app(lambda: Service(sizing, ("tiny",), options, guardrails), Listen())
        with TestClient(app) as made:
            app.state.cosmos3.stage.wait_ready(HANG)
            yield made
        os.environ.pop(CHECKER)


def say(socket: Any, **message: Any) -> None:
    socket.send_bytes(msgspec.msgpack.encode(message))


def told(socket: Any) -> list[dict[str, Any]]:
    """All messages until the server closes, and last its code."""
    messages = []
    while True:
        try:
            messages.append(msgspec.msgpack.decode(socket.receive_bytes()))
        except WebSocketDisconnect as end:
            return [*messages, {"type": "end", "code": end.code, "reason": end.reason}]


def sessions(client: TestClient, count: int) -> None:
    """Wait until so many are open."""
    deadline = time.monotonic() + HANG
    while client.get("/health").json()["sessions"]["open"] != count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_frames_are_those_of_python(client: TestClient, checkpoint: Path) -> None:
    start = {"prompt": "A robot arm", "size": "48x64", "seed": 5, "image": PICTURE, "history": 6}
    with (
        Cosmos3(checkpoint, dtype="float32", device="cpu") as model,
        model.session(**start) as session,
    ):
        expected = np.concatenate(list(session.rollout(ROWS.reshape(2, 8, 59))))
    with client.websocket_connect(PATH) as socket:
        say(socket, **INIT)
        messages = told(socket)
    sent = [m for m in messages if m["type"] == "frame_batch"]
    assert [(m["chunk_index"], m["frame_batch_index"], m["num_frames"]) for m in sent] == [
        (0, 0, 1),
        (0, 1, 8),
        (1, 0, 8),
    ]
    assert [m["is_final_frame_batch"] for m in sent] == [False, True, True]
    data = b"".join(m["payload"] for m in sent)
    made = 255 - np.frombuffer(data, np.uint8).reshape(-1, 64, 48, 3)
    assert np.abs(made.astype(int) - expected.astype(int)).max() <= 1
    stats = [m for m in messages if m["type"] == "chunk_stats"]
    assert [m["chunk_index"] for m in stats] == [0, 1]
    assert all(m["denoise_ms"] > 0 for m in stats)
    assert messages[-1]["code"] == 1000


def test_what_the_server_says_of_a_simulator(client: TestClient) -> None:
    """Domain ids are those of the synthetic export, and of the published one: agibotworld is 15."""
    (model,) = client.get("/v1/cosmos3/models").json()["data"]
    block = model["cosmos3"]
    assert block["modes"] == ["world_model"]
    assert {name: row["width"] for name, row in block["action_domains"].items()} == dict.fromkeys(
        ("agibotworld", "agibot_gear_gripper", "camera_pose", "hand_pose"), 59
    )
    assert block["action_domains"]["agibotworld"]["domain_id"] == 15


def test_pictures_events_and_wrong_rows(client: TestClient) -> None:
    changes = {"condition_inputs": {}, "realtime_output_format": "webp", "max_chunks": 1000}
    messages: list[dict[str, Any]] = []
    errors: list[str] = []
    with client.websocket_connect(PATH) as socket:
        say(socket, **INIT | changes)
        say(socket, type="event", kind="action", payload=[[1.0] * 7], event_id=1)
        say(socket, type="event", kind="action", payload=[0.5] * 59, event_id=2)
        say(socket, type="event", kind="jump", payload=[])
        two = [[0.5] * 59, [0.5] * 9 + [0.0] * 50]
        action = {"type": "event", "kind": "action", "payload": two}
        say(socket, **action, domain_id=99)
        say(socket, **action, domain_name=["agibotworld"] * 3)
        say(socket, **action, domain_name="camera_pose")
        say(socket, **action, domain_id=[15, 2])
        say(socket, **action | {"payload": [0] * 2**23})
        while len(errors) < 6 or messages[-1]["type"] != "chunk_stats":  # to the end of a chunk
            messages.append(msgspec.msgpack.decode(socket.receive_bytes()))
            errors = [m["content"] for m in messages if m["type"] == "error"]
        socket.close()
        sessions(client, 0)  # the test's client would cancel what is not served to its end
    assert "rows of 59 finite numbers" in errors[0]
    assert "jump" in errors[1]
    assert "one of 2, 3, 15" in errors[2]
    assert "an embodiment, or one for each of 2 rows" in errors[3]
    assert "0 beyond the numbers that the embodiment of a row has" in errors[4]
    assert "must be of at most 4194304 bytes beside first_frame" in errors[5]
    sent = [m for m in messages if m["type"] == "frame_batch"]
    assert len(sent) == 1 + 8 * sum(m["type"] == "chunk_stats" for m in messages)
    assert {m["event_id"] for m in sent} <= {None, 2}
    with Image.open(io.BytesIO(sent[-1]["payload"])) as picture:
        assert (picture.format, picture.size) == ("WEBP", (48, 64))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"size": "50x50"}, "size is '50x50'"),
        ({"size": "\N{EM DASH}" * 70}, "size is"),
        ({"first_frame": "/etc/passwd"}, "base64"),
        ({"first_frame": [0] * 2**20}, "first_frame is 'unreadable', must be bytes"),
        ({"first_frame": b"x"}, "first_frame is '1 bytes', must be a complete PNG"),
        ({"realtime_causal_kv_cache_num_frames": 6, "realtime_causal_sink_size": 6}, "realtime_causal_kv_cache_num_frames is 6, must be above 6"),
        ({"realtime_causal_sink_size": -1}, "realtime_causal_sink_size is -1, must be an integer from 0"),
        ({"action_view_point": "x"}, "action_view_point is 'x', must be one of ego_view"),
        ({"realtime_output_format": "webp", "realtime_preview_max_width": -5}, ">= 0 - at `$.realtime_preview_max_width`"),
        ({"max_chunks": -1}, ">= 0 - at `$.max_chunks`"),
        ({"condition_inputs": {"action_rows": [[]] * 2**23}}, "bytes', must be of at most 4194304 bytes beside first_frame"),
        ({"type": "event"}, "init: "),
        ({"condition_inputs": {"domain_name": "cat"}}, "one of agibotworld"),
        ({"condition_inputs": {"action_rows": [[1.0]]}}, "rows of 59"),
        ({"prompt": "forbidden"}, "the prompt was blocked by the guardrails (violence)"),
        ({"size": "128x64", "first_frame": None}, "the result was blocked by the guardrails"),
    ],
)  # fmt: skip
def test_a_session_that_cannot_begin(client: TestClient, change: dict[str, Any], reason: str) -> None:  # fmt: skip
    with client.websocket_connect(PATH) as socket:
        say(socket, **INIT | change)
        error, end = told(socket)
    assert reason in error["content"]
    assert end["code"] == 1008
    assert error["content"].startswith(end["reason"])
    assert len(end["reason"].encode()) <= 123  # more no closing frame may have
    sessions(client, 0)


def test_too_many_a_client_that_goes_and_a_rank_that_dies(client: TestClient) -> None:
    endless = {k: v for k, v in INIT.items() if k != "max_chunks"}
    with client.websocket_connect(PATH) as one:
        say(one, **endless)
        one.receive_bytes()
        with client.websocket_connect(PATH) as two:
            say(two, **endless)
            two.receive_bytes()
            sessions(client, 2)
            with client.websocket_connect(PATH) as third:
                say(third, **INIT)
                error, end = told(third)
            assert error["content"] == "2 of 2 sessions are open"
            assert (error["code"], end["code"]) == ("queue_full", 1008)
            two.close()
            sessions(client, 1)
        service = client.app.state.cosmos3  # type: ignore[attr-defined]
        rank = by_age(processes_below(service.stage._process.pid))[-1]
        os.kill(rank, signal.SIGKILL)
        *_, error, end = told(one)
        assert error["code"] in ("worker_lost", "session_lost")
        assert end["code"] == 1011
    sessions(client, 0)
    assert "cosmos3:sessions_open 0.0" in client.get("/metrics").text
    with client.websocket_connect(PATH) as again:
        say(again, **INIT)
        assert told(again)[-1]["code"] == 1000
