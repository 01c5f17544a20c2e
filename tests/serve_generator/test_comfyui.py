"""The ComfyUI nodes against a real server, called as ComfyUI calls nodes: by their class attributes."""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
import torch
from generators import LONG
from servers import Server

pytestmark = pytest.mark.serve
FOLDER = Path(__file__).parents[2] / "integrations" / "comfyui"


@pytest.fixture(scope="module")
def nodes() -> ModuleType:
    """The package, imported from its folder as ComfyUI imports custom nodes."""
    place = FOLDER / "__init__.py"
    spec = importlib.util.spec_from_file_location(
        "cosmos3_nodes", place, submodule_search_locations=[str(FOLDER)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cosmos3_nodes"] = module
    spec.loader.exec_module(module)
    return module


def run(nodes: ModuleType, name: str, **inputs: Any) -> tuple[Any, ...]:
    """What a workflow gets: the defaults of the required inputs, and these instead of them."""
    node = nodes.NODE_CLASS_MAPPINGS[name]
    required = node.INPUT_TYPES()["required"]
    defaults = {key: options["default"] for key, (_, options) in required.items()}
    results: tuple[Any, ...] = getattr(node(), node.FUNCTION)(**{**defaults, **inputs})
    assert len(results) == len(node.RETURN_TYPES)
    return results


SMALL = {"width": 64, "height": 64, "steps": 2, "seed": 1}


@pytest.mark.parametrize("name", ["Cosmos3Video", "Cosmos3Image", "Cosmos3Ask"])
def test_a_node_keeps_the_contract(nodes: ModuleType, name: str) -> None:
    node = nodes.NODE_CLASS_MAPPINGS[name]
    assert name in nodes.NODE_DISPLAY_NAME_MAPPINGS
    inputs = node.INPUT_TYPES()
    assert inputs.keys() <= {"required", "optional", "hidden"}
    taken = inspect.signature(getattr(node, node.FUNCTION)).parameters
    assert list(taken)[1:] == [key for group in inputs.values() for key in group]
    for key in inputs.get("optional", {}):
        assert taken[key].default is not inspect.Parameter.empty
    for kind, *options in (entry for group in inputs.values() for entry in group.values()):
        assert kind in ("STRING", "INT", "FLOAT", "BOOLEAN", "IMAGE")
        assert all(isinstance(option, dict) for option in options)


def test_a_video_with_sound_from_a_picture(generator_server: Server, nodes: ModuleType) -> None:
    frames, sound, fps = run(
        nodes, "Cosmos3Video", server=generator_server.url, prompt="a boat", **SMALL,
        num_frames=5, fps=12.0, guidance=2.0, image=torch.rand(1, 64, 64, 3), sound=True,
    )  # fmt: skip
    assert (tuple(frames.shape), frames.dtype, fps) == ((5, 64, 64, 3), torch.float32, 12.0)
    assert 0 <= frames.min() <= frames.max() <= 1
    batch, channels, samples = sound["waveform"].shape
    assert (batch, channels, sound["sample_rate"]) == (1, 2, 48_000)
    assert samples / 48_000 == pytest.approx(5 / 12, abs=0.1)


def test_a_video_without_sound_has_silence(generator_server: Server, nodes: ModuleType) -> None:
    _, sound, _ = run(
        nodes, "Cosmos3Video", server=generator_server.url, prompt="a boat", **SMALL,
        num_frames=5, fps=10.0, more=json.dumps({"guidance_scale": 1}),
    )  # fmt: skip
    assert tuple(sound["waveform"].shape) == (1, 2, 24_000)
    assert not sound["waveform"].any()


def test_an_image(generator_server: Server, nodes: ModuleType) -> None:
    (image,) = run(nodes, "Cosmos3Image", server=generator_server.url, prompt="a boat", **SMALL)
    assert tuple(image.shape) == (1, 64, 64, 3)


def test_errors_are_the_servers_words(generator_server: Server, nodes: ModuleType) -> None:
    with pytest.raises(RuntimeError, match=r"^Cosmos 3: prompt is missing|text that is not empty"):
        run(nodes, "Cosmos3Image", server=generator_server.url, prompt=" ", **SMALL)
    with pytest.raises(RuntimeError, match="Cosmos 3: no server at"):
        run(nodes, "Cosmos3Image", server="http://127.0.0.1:9", prompt="a", **SMALL)


def test_cancelling_in_comfyui_ends_the_job(generator_server: Server, nodes: ModuleType) -> None:
    client = sys.modules["cosmos3_nodes.client"]
    told: list[int] = []
    pressed = threading.Event()

    def progress(percent: int) -> None:
        told.append(percent)
        pressed.set()

    with pytest.raises(RuntimeError, match="cancelled"):
        client.made_video(generator_server.url, {"prompt": "a", **LONG}, progress, pressed.is_set)
    assert told
    videos = httpx.get(f"{generator_server.url}/v1/videos?limit=100").json()["data"]
    assert {job["status"] for job in videos} <= {"completed", "failed"}
