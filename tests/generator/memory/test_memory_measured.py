"""The estimates against what is really alive, on a CPU."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from live_tensors import LiveTensors
from ranks import Ranks, in_new_process

from vllm_cosmos3.checkpoint.config import read_config
from vllm_cosmos3.engine_options import EngineConfig, ParallelConfig
from vllm_cosmos3.generator.memory import estimate, work_of
from vllm_cosmos3.generator.memory.vae_activations import decode_peak
from vllm_cosmos3.generator.memory.weight_bytes import layer_bytes, weights
from vllm_cosmos3.generator.models.transformer import Transformer
from vllm_cosmos3.generator.models.vae import VideoVAE, to_frames
from vllm_cosmos3.generator.pipeline import Pipeline
from vllm_cosmos3.parallel.attention import make_attend
from vllm_cosmos3.parallel.mesh import Mesh, init_mesh
from vllm_cosmos3.request.batching import with_batch
from vllm_cosmos3.request.planner import make_plan
from vllm_cosmos3.request.request import from_fields

VIDEO = {"size": "320x192", "num_frames": 25}
BATCH = {
    "size": "64x64",
    "num_frames": 1,
    "n": 8,
    "prompt_token_ids": list(range(10, 510)),
    "negative_prompt_token_ids": list(range(510)),
}
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("bfloat16", VIDEO),
    ("float32", VIDEO),
    ("bfloat16", {**VIDEO, "image": np.zeros((192, 320, 3), np.uint8)}),
    ("bfloat16", {"size": "128x64", "num_frames": 49, "generate_sound": True}),
    ("bfloat16", {"size": "256x256", "num_frames": 1}),
    (
        "bfloat16",
        {**VIDEO, "num_inference_steps": 5, "step_cache": "sea", "step_cache_threshold": 10.0},
    ),
    (
        "bfloat16",
        {
            "action_mode": "policy",
            "domain_name": "av",
            "image": np.zeros((80, 112, 3), np.uint8),
            "size": "192x128",
        },
    ),
    (
        "bfloat16",
        {
            "size": "192x128",
            "num_frames": 25,
            "edge": {"control": np.zeros((25, 128, 192, 3), np.uint8)},
            "blur": {"control": np.zeros((25, 128, 192, 3), np.uint8)},
        },
    ),
    (
        "bfloat16",
        {
            "size": "192x128",
            "edge": {"control": np.zeros((37, 128, 192, 3), np.uint8)},
            "num_video_frames_per_chunk": 13,
        },
    ),
    ("float32", {"size": "64x64", "num_frames": 5, "output_type": "latent"}),
    ("bfloat16", BATCH),
    ("bfloat16", {**BATCH, "guidance_interval": (0, 990)}),
]
LATENTS = {"size": "192x128", "num_frames": 13, "num_chunks": 2, "output_type": "latent"}


FP8: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"quantization": "fp8"}, VIDEO),
    ({"quantization": "fp8", "fp8_first_steps": 0, "fp8_last_steps": 0}, VIDEO),
    ({"quantization": "fp8", "fp8_first_steps": 1, "fp8_last_steps": 1}, BATCH),
]


Case = tuple[Path, dict[str, Any], dict[str, Any]]  # folder, options, fields


def peaks(cases: list[Case]) -> list[tuple[int, int]]:
    """Of each request in turn, from the first weight on: measured and planned.

    On a CPU vLLM packs matrices into memory of oneDNN, which torch does not see. So the weights are
    counted by their parameters, which another test compares with the plan byte by byte.
    """
    mesh = init_mesh(ParallelConfig())
    return [peak(mesh, *case) for case in cases]


def peak(
    mesh: Mesh, folder: Path, options: dict[str, Any], fields: dict[str, Any]
) -> tuple[int, int]:
    """Of one request on this rank."""
    config = EngineConfig(model=folder, und_residency="gpu", **options)
    model = config.read_model()
    with LiveTensors() as live:
        pipeline = Pipeline.load(config, mesh, "cpu")
        seen = live.now
        settings = {"num_inference_steps": 3, "max_sequence_length": 512}
        settings |= {} if "prompt_token_ids" in fields else {"prompt": "A boat"}
        plan = make_plan(from_fields({**settings, **fields}), pipeline.model, pipeline.tokenizer)
        plan = with_batch(plan, patch=model.transformer.latent_patch_size, limit=8)
        state = pipeline.encode(plan)
        while not state.done:
            pipeline.step(state)
        pipeline.decode(state)
        del pipeline, state
    memory = estimate(model, config, work_of(plan))
    return live.peak - seen + memory.resident, memory.peak


def test_the_plan_is_within_a_tenth_of_the_peak(
    tiny_checkpoint: Path, tiny_edge_fp32: Path
) -> None:
    cases: list[Case] = [(tiny_checkpoint, {"dtype": dtype}, fields) for dtype, fields in REQUESTS]
    cases += [(tiny_checkpoint, *case) for case in FP8]
    cases += [(tiny_edge_fp32, {"dtype": dtype}, VIDEO) for dtype in ("bfloat16", "float32")]
    cases.append((tiny_checkpoint, {"dtype": "bfloat16"}, LATENTS))
    *found, (measured, planned) = in_new_process(peaks, cases)
    assert measured <= planned <= 1.5 * measured  # chunks are decoded, but no frame is kept
    for (_, options, fields), (measured, planned) in zip(cases, found, strict=False):
        assert abs(planned - measured) <= 0.1 * measured, (options, fields, measured, planned)


def test_the_second_rank_of_guidance_has_two_of_three_branches(
    tiny_checkpoint: Path, ranks: Ranks
) -> None:
    fields = {
        "size": "192x128",
        "edge": {"control": np.zeros((25, 128, 192, 3), np.uint8)},
        "control_guidance": 2.0,
        "prompt_token_ids": list(range(10, 510)),
        "negative_prompt_token_ids": list(range(500)),
        "step_cache": "sea",
        "output_type": "latent",
    }
    parallel = ParallelConfig(cfg_parallel_size=2)
    found = ranks(parallel, peak, tiny_checkpoint, asdict(parallel), fields)
    measured, planned = max(measured for measured, _ in found), found[0][1]
    assert abs(planned - measured) <= 0.1 * measured


SHAPE = (1, 48, 4, 13, 22)  # an odd plane that two ranks cannot divide evenly


def decoding(mesh: Mesh, folder: Path, parallel: str) -> int:
    """Bytes at the peak of decoding, beside weights and latents."""
    vae = VideoVAE(read_config(folder).vae, mesh.world, parallel)
    with LiveTensors() as live:
        latents = torch.zeros(SHAPE)
        live.now = live.peak = 0
        chunks = [to_frames(x) for x in vae.decode(latents) if mesh.world.rank == 0]
    return live.peak if chunks or mesh.world.rank else 0


@pytest.mark.parametrize("parallel", ["halo", "tile", "off"])
def test_decoding_on_two_ranks(tiny_checkpoint: Path, parallel: str, ranks: Ranks) -> None:
    mesh = ParallelConfig(ulysses_degree=2)
    measured = max(ranks(mesh, decoding, tiny_checkpoint, parallel))
    planned = decode_peak(
        read_config(tiny_checkpoint).vae,
        SHAPE,
        world=2,
        parallel=parallel,
        element_size=4,
        fused=False,
    )
    assert abs(planned - measured) <= 0.1 * measured


def parameter_bytes(mesh: Mesh, folder: Path, quantization: str | None) -> dict[str, int]:
    """Of this rank, as vLLM's layers allocate them."""
    checkpoint = EngineConfig(model=folder, quantization=quantization).read_model()
    config = checkpoint.transformer
    cpu, dtype = torch.device("cpu"), torch.bfloat16
    attend = make_attend("sdpa", device=cpu, dtype=dtype, head_dim=config.head_dim)
    own = {"quantization": checkpoint.quantization}
    model = Transformer(config, mesh, attend, dtype=dtype, device=cpu, **own)
    sizes = {name: p.nbytes for name, p in model.named_parameters()}
    parts = {
        "generation": [n for n in sizes if n.startswith("layers.")],
        "embedding": [n for n in sizes if n.startswith("understanding.embed_tokens.")],
        "layer": [n for n in sizes if n.startswith("layers.1.")],
    }
    text = [n for n in sizes if n.startswith("understanding.")]
    parts["understanding"] = [n for n in text if n not in parts["embedding"]]
    rest = set(sizes) - {n for names in parts.values() for n in names}
    parts["adapters"] = sorted(rest)
    return {part: sum(sizes[n] for n in names) for part, names in parts.items()}


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    ("checkpoint", "quantization"),
    [
        ("tiny_checkpoint", None),
        ("tiny_checkpoint", "fp8"),
        ("tiny_checkpoint_fp8", None),
        ("tiny_edge_fp32", None),
        ("tiny_edge_fp32", "fp8"),
    ],
)
def test_weights_are_those_of_the_layers(
    request: pytest.FixtureRequest,
    checkpoint: str,
    quantization: str | None,
    tp: int,
    ranks: Ranks,
) -> None:
    folder = request.getfixturevalue(checkpoint)
    parallel = ParallelConfig(tensor_parallel_size=tp)
    (measured, *_) = ranks(parallel, parameter_bytes, folder, quantization)
    model = EngineConfig(model=folder, quantization=quantization).read_model()
    planned = weights(model, tensor_parallel_size=tp, element_size=2)
    layer = layer_bytes(model, tensor_parallel_size=tp, element_size=2)
    assert measured == {
        "layer": layer,
        **{part: planned[part] for part in measured if part != "layer"},
    }
