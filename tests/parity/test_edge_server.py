"""Edge's policy served: chat equals transformers, and a robot gets what the same request makes here.

One server for both: ``vllm-cosmos3 serve``, which becomes the stock command with our architecture. The
policy's weights are drawn as those of Edge, so Edge's folder is the reference. Its own root index
misspells tensors, as the published one does.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from media_files import clip
from robots import PATH, observation, robot
from servers import BIN, BOTH, SMALL, Server, running
from test_reasoner import CASES, check

from vllm_cosmos3 import Cosmos3, droid
from vllm_cosmos3.checkpoint.synthetic import write_checkpoint

pytestmark = [
    pytest.mark.parity,
    pytest.mark.serve,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy") / "tiny"
    write_checkpoint(folder, kind="edge-policy-droid", dtype="float32")
    return folder


@pytest.fixture(scope="module")
def server(
    policy: Path, media_folder: Path, vllm_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    command = [str(BIN / "vllm-cosmos3"), "serve", str(policy)]
    command += ["--storage-path", str(folder / "storage"), "--generator-dtype", "float32"]
    command += ["--max-logprobs", "-1"]
    command += ["--allowed-local-media-path", str(media_folder), *SMALL]
    with running(command, folder, vllm_cache, variables=BOTH) as server:
        yield server


@pytest.fixture(scope="module")
def video(media_folder: Path) -> Path:
    return clip(media_folder / "edge.mp4", frames=60, fps=24)


@pytest.mark.parametrize("case", CASES)
def test_log_probabilities_equal_those_of_transformers(
    case: str, server: Server, video: Path, tiny_edge_fp32: Path
) -> None:
    check(server, tiny_edge_fp32, case, video)


def test_a_robot_is_answered_with_the_defaults_of_the_policy(server: Server, policy: Path) -> None:
    seen = observation(sampling_params=None, seed=3)
    with robot(server.url, PATH + "?reply=dict", authorization=None) as arm:
        actions = arm.ask(seen)["actions"]
    read = droid.read(seen)
    fields = droid.request_fields(read, seed=3, kind="edge-policy-droid")
    with Cosmos3(policy, dtype="float32", device="cpu") as model:
        made = model.generate(fields)
    effective = made.effective
    assert (effective["num_inference_steps"], effective["guidance_interval"]) == (4, (960, 1001))
    assert actions.shape == (32, 8)
    np.testing.assert_allclose(actions, droid.actions(made.action, read), atol=1e-4)


def test_what_it_was_not_made_for_is_refused(server: Server) -> None:
    answer = httpx.post(f"{server.url}/v1/videos", json={"prompt": "a boat"})
    assert answer.status_code == 400
    assert (
        "as the kind of this checkpoint is edge-policy-droid" in answer.json()["error"]["message"]
    )
