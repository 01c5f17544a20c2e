"""The export of a simulator for cameras on two ranks, from Python and over the WebSocket, against the cache-less reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from causal_reference import pictures, reference
from limits import HANG
from rollouts import CASES, PICTURE, Case, actions, open_world, rollout
from starlette.testclient import TestClient
from test_worlds import INIT, PATH, say, told

from vllm_cosmos3 import Cosmos3
from vllm_cosmos3.checkpoint.synthetic import write_checkpoint
from vllm_cosmos3.engine_options import EngineConfig, ParallelConfig
from vllm_cosmos3.generator.world import WorldPipeline
from vllm_cosmos3.parallel.mesh import close_mesh, init_mesh
from vllm_cosmos3.server.app import Listen, make_app
from vllm_cosmos3.server.guardrails import Guardrails
from vllm_cosmos3.server.jobs.service import Service
from vllm_cosmos3.server.memory_split import sized
from vllm_cosmos3.server.options import Options

CASE = CASES["camera, everything remembered"]
FRAMES = 16  # of a chunk of four latent ones


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("camera") / "tiny"
    write_checkpoint(folder, kind=CASE.kind, dtype="float32")
    return folder


@pytest.fixture(scope="module")
def rows_and_frames(checkpoint: Path) -> tuple[list[np.ndarray], np.ndarray]:
    """The camera's paths of two chunks, and what the reference makes of them."""
    mesh = init_mesh(ParallelConfig())
    config = EngineConfig(model=checkpoint, dtype="float32", device="cpu")
    pipeline = WorldPipeline.load(config, mesh, "cpu")
    ((first,), _) = rollout(pipeline, Case(kind=CASE.kind, fields=CASE.fields, steps=()))
    with torch.inference_mode():
        frames = pictures(pipeline, reference(pipeline, CASE, first))
    close_mesh(mesh)
    rows = [part for part in actions(open_world(pipeline, CASE), CASE) if part is not None]
    return rows, frames


def check(made: np.ndarray, expected: np.ndarray) -> None:
    assert made.shape == expected.shape == (1 + 2 * FRAMES, 64, 48, 3)
    assert np.abs(made.astype(int) - expected.astype(int)).max() <= 1


def test_from_python_on_two_ranks(
    checkpoint: Path, rows_and_frames: tuple[list[np.ndarray], np.ndarray]
) -> None:
    rows, expected = rows_and_frames
    start = {"prompt": "A robot arm", "size": "48x64", "seed": 5, "fps": 20.0, "image": PICTURE}
    with Cosmos3(checkpoint, dtype="float32", device="cpu", tensor_parallel_size=2) as model:
        with model.session(**start) as session:
            assert session.action_shape == (FRAMES, 9)
            check(np.concatenate(list(session.rollout(rows))), expected)
        with model.session(**start) as session:
            idle = session.step().astype(int)
    assert np.abs(idle - expected[1 : 1 + FRAMES].astype(int)).max() > 4  # what is done matters


def test_over_the_websocket_on_two_ranks(
    checkpoint: Path, tmp_path: Path, rows_and_frames: tuple[list[np.ndarray], np.ndarray]
) -> None:
    rows, expected = rows_and_frames
    engine = {"dtype": "float32", "ulysses_degree": 2}
    options = Options(storage_path=str(tmp_path), guardrails="off", engine=engine)
    sizing, guardrails = sized(checkpoint, options, "cpu"), Guardrails(options)
    app = make_app(lambda: Service(sizing, ("tiny",), options, guardrails), Listen())
    begin = {k: v for k, v in INIT.items() if k != "realtime_causal_kv_cache_num_frames"}
    begin |= {"fps": 20.0, "condition_inputs": {"action_rows": np.concatenate(rows).tolist()}}
    with TestClient(app) as client:
        app.state.cosmos3.stage.wait_ready(HANG)
        (model,) = client.get("/v1/cosmos3/models").json()["data"]
        assert model["cosmos3"]["action_domains"]["camera_pose"]["width"] == 9
        with client.websocket_connect(PATH) as socket:
            say(socket, **begin | {"condition_inputs": {"action_rows": [[0.0] * 59]}})
            assert "rows of 9 finite numbers" in told(socket)[0]["content"]
        with client.websocket_connect(PATH) as socket:
            say(socket, **begin)
            messages = told(socket)
    assert messages[-1]["code"] == 1000
    sent = [m for m in messages if m["type"] == "frame_batch"]
    batches = [(m["chunk_index"], m["num_frames"]) for m in sent]
    assert batches == [(0, 1), (0, FRAMES), (1, FRAMES)]
    made = np.frombuffer(b"".join(m["payload"] for m in sent), np.uint8)
    check(made.reshape(-1, 64, 48, 3), expected)
