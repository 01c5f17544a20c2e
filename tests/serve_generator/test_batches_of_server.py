"""Pictures that are asked for at once share their steps, and are what they are alone."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from generators import eventually, generator, suspended
from limits import HANG
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from servers import Server

pytestmark = pytest.mark.serve
CLIENTS = 8
PICTURE = {"size": "320x192", "num_inference_steps": 12, "negative_prompt": "blurry"}


@pytest.fixture(scope="module")
def batching(
    tiny_checkpoint: Path, vllm_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """In float32, where batching makes a difference of rounding alone."""
    flags = ["--max-batch-size", str(CLIENTS), "--generator-dtype", "float32"]
    folder = tmp_path_factory.mktemp("batching")
    with generator(tiny_checkpoint, folder, vllm_cache, *flags) as server:
        yield server


def made(server: Server, **fields: Any) -> tuple[list[np.ndarray], dict[str, Any]]:
    """The pixels of a request's pictures, and the block ``cosmos3`` of its answer."""
    answer = httpx.post(
        f"{server.url}/v1/images/generations", json={**PICTURE, **fields}, timeout=HANG
    )
    assert answer.status_code == 200, answer.text
    pictures = [base64.b64decode(one["b64_json"]) for one in answer.json()["data"]]
    pixels = [np.asarray(Image.open(io.BytesIO(one))).astype(int) for one in pictures]
    return pixels, answer.json()["cosmos3"]


def accepted(server: Server) -> int:
    """Requests that wait or run."""
    queue = httpx.get(f"{server.url}/health").json()["queue"]
    return int(queue["waiting"] + queue["running"])


def served(server: Server) -> tuple[float, float]:
    """Requests in the histogram of batches, and their sum."""
    page = httpx.get(f"{server.url}/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(page)}
    samples = {one.name: one.value for one in families["cosmos3:batch_size"].samples}
    return samples["cosmos3:batch_size_count"], samples["cosmos3:batch_size_sum"]


def check_equal(pixels: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for one, other in zip(pixels, expected, strict=True):
        assert one.shape == (192, 320, 3)
        assert np.abs(one - other).max() <= 1


def test_pictures_asked_for_at_once_are_made_together(batching: Server) -> None:
    asked = [{"prompt": f"{at} paper boats", "seed": at} for at in range(CLIENTS)]
    with ThreadPoolExecutor(CLIENTS) as pool:
        with suspended(batching):  # no step is made before all have come
            coming = pool.map(lambda fields: made(batching, **fields), asked)
            eventually(lambda: accepted(batching) == CLIENTS)
        together = list(coming)
    sizes = [block["batch_size"] for _, block in together]
    assert sizes == [CLIENTS] * CLIENTS
    assert served(batching) == (CLIENTS, sum(sizes))
    for fields, (pixels, block) in zip(asked, together, strict=True):
        expected, alone = made(batching, **fields)
        check_equal(pixels, expected)
        assert alone["batch_size"] == 1
        assert block["num_steps"] == block["step"] == PICTURE["num_inference_steps"]
        assert block["timings_s"].keys() == alone["timings_s"].keys()


def test_pictures_of_one_request_are_made_together(batching: Server) -> None:
    pixels, block = made(batching, prompt="A boat", seed=3, n=4)
    assert (block["batch_size"], block["num_steps"]) == (4, PICTURE["num_inference_steps"])
    expected = [made(batching, prompt="A boat", seed=seed)[0][0] for seed in range(3, 7)]
    check_equal(pixels, expected)
