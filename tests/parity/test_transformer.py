"""The transformer against Cosmos3OmniTransformer of diffusers, float32, the same tiny checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import Cosmos3OmniPipeline, Cosmos3OmniTransformer
from torch import Tensor

from vllm_cosmos3.checkpoint.config import read_config
from vllm_cosmos3.checkpoint.latents import patch_grid
from vllm_cosmos3.checkpoint.tensors import transformer_tensors
from vllm_cosmos3.checkpoint.weights import load_weights
from vllm_cosmos3.engine_options import ParallelConfig
from vllm_cosmos3.generator.models.modalities import frame_mask
from vllm_cosmos3.generator.models.transformer import Context, Transformer
from vllm_cosmos3.generator.models.weight_tables import weight_table
from vllm_cosmos3.generator.sampling import positions
from vllm_cosmos3.generator.sampling.packing import Stream, start_stream
from vllm_cosmos3.parallel.attention import make_attend
from vllm_cosmos3.parallel.mesh import Mesh, close_mesh, init_mesh

pytestmark = pytest.mark.parity

CPU = torch.device("cpu")
BOUND = 1e-5  # absolute; velocities reach about 4


@dataclass(frozen=True, kw_only=True)
class Case:
    """One forward. ``clean_frames`` and ``clean_rows`` are given, everything else is generated."""

    frames: int = 3
    height: int = 5
    width: int = 7
    clean_frames: tuple[int, ...] = ()
    sound: int = 0
    given_sound: bool = False
    rows: int = 0
    clean_rows: tuple[int, ...] = ()
    domain: int = 0
    fps: float = 24.0
    timestep: int = 777
    text: int = 13


CASES = {
    "image": Case(frames=1, height=4, width=6, timestep=999),
    "video": Case(frames=4, height=4, width=6, fps=30.0),
    "odd size": Case(timestep=1),
    "given frames": Case(clean_frames=(0, 1), timestep=227, fps=16.0),
    "sound": Case(sound=9, timestep=0),
    "given sound": Case(clean_frames=(0,), sound=9, given_sound=True, timestep=511),
    "action": Case(rows=8, domain=31, fps=5.0),
    "everything": Case(
        clean_frames=(0,), sound=11, rows=8, clean_rows=(0,), domain=7, fps=15.0, text=40
    ),
    "all frames given": Case(clean_frames=(0, 1, 2), rows=8, domain=15, fps=10.0),
}


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    mesh = init_mesh(ParallelConfig())
    yield mesh
    close_mesh(mesh)


@pytest.fixture(scope="module")
def oracle(tiny_checkpoint_fp32: Path) -> Cosmos3OmniTransformer:
    return Cosmos3OmniTransformer.from_pretrained(tiny_checkpoint_fp32 / "transformer").eval()


@pytest.fixture(scope="module")
def ours(tiny_checkpoint_fp32: Path, mesh: Mesh) -> Transformer:
    return load(tiny_checkpoint_fp32, mesh, torch.float32)


def load(folder: Path, mesh: Mesh, dtype: torch.dtype) -> Transformer:
    config = read_config(folder).transformer
    attend = make_attend(device=CPU, dtype=dtype, head_dim=config.head_dim)
    model = Transformer(config, mesh, attend, dtype=dtype, device=CPU)
    load_weights(model, weight_table(config), folder / "transformer", transformer_tensors(config))
    return model


@pytest.mark.parametrize("name", CASES)
def test_velocities_equal_those_of_the_reference(
    name: str, ours: Transformer, oracle: Cosmos3OmniTransformer
) -> None:
    case = CASES[name]
    streams, ids = inputs(case)
    with torch.inference_mode():
        expected = reference(oracle, case, streams, ids)
        actual = velocities(ours, case, streams, ids)
    assert len(actual) == len(expected)
    for stream, a, b in zip(streams, actual, expected, strict=True):
        assert a.dtype == torch.float32
        assert a.shape == stream.x.shape
        assert (a - b).abs().max() <= BOUND, stream.name
        assert (a.abs().amax() > 0.01) == bool(stream.denoise_mask.any()), stream.name


def test_bfloat16_stays_near_float32(tiny_checkpoint: Path, mesh: Mesh, ours: Transformer) -> None:
    case = CASES["everything"]
    streams, ids = inputs(case)
    model = load(tiny_checkpoint, mesh, torch.bfloat16)
    with torch.inference_mode():
        for a, b in zip(
            velocities(model, case, streams, ids),
            velocities(ours, case, streams, ids),
            strict=True,
        ):
            assert (a - b).norm() / b.norm() < 0.03


def test_every_input_matters(ours: Transformer) -> None:
    """A case that equals the reference proves little if it does not depend on what it is given."""
    case = CASES["everything"]
    streams, ids = inputs(case)
    others = {
        "text": (case, streams, ids.flip(0)),
        "timestep": (replace(case, timestep=778), streams, ids),
        "domain": (replace(case, domain=8), streams, ids),
        "fps": (replace(case, fps=15.5), streams, ids),
        "given frame": (case, [restarted(streams[0]), *streams[1:]], ids),
    }
    with torch.inference_mode():
        base = velocities(ours, case, streams, ids)
        for name, arguments in others.items():
            changed = velocities(ours, *arguments)
            assert not torch.allclose(changed[0], base[0], atol=1e-4), name


def inputs(case: Case) -> tuple[list[Stream], Tensor]:
    """Random latents and token ids of a case."""
    generator = torch.Generator().manual_seed(case.frames + 10 * case.sound + 100 * case.rows)

    def stream(name: str, shape: tuple[int, ...], free: Tensor) -> Stream:
        noise, clean = (torch.randn(shape, generator=generator) for _ in range(2))
        return start_stream(name, noise=noise, clean_latent=clean, denoise_mask=free)

    vision = (1, 48, case.frames, case.height, case.width)
    streams = [stream("vision", vision, frame_mask(case.frames, case.clean_frames))]
    if case.sound:
        free = torch.full((1, case.sound), not case.given_sound)
        streams.append(stream("sound", (64, case.sound), free))
    if case.rows:
        free = torch.ones(case.rows, 64, dtype=torch.bool)
        free[list(case.clean_rows)] = False
        streams.append(stream("action", (case.rows, 64), free))
    return streams, torch.randint(0, 300, (case.text,), generator=generator)


def restarted(stream: Stream) -> Stream:
    return start_stream(
        stream.name,
        noise=stream.x,
        clean_latent=stream.clean_latent + 1,
        denoise_mask=stream.denoise_mask,
    )


def velocities(
    model: Transformer, case: Case, streams: list[Stream], ids: Tensor
) -> tuple[Tensor, ...]:
    config = model.config
    start = positions.generation_start(len(ids), config)
    frames, rows, columns = patch_grid(tuple(streams[0].x.shape), 2)
    parts = [
        positions.vision_positions(frames, rows, columns, start=start, fps=case.fps, config=config)
    ]
    if case.sound:
        parts.append(positions.sound_positions(case.sound, start=start, config=config))
    if case.rows:
        parts.append(
            positions.action_positions(case.rows, start=start, fps=case.fps, first=1, config=config)
        )
    rope = model.rope(torch.cat(parts, dim=1))
    timestep = torch.tensor(float(case.timestep))
    context = Context(texts=(model.understand(ids),), rope=rope)
    return model(streams, context, timestep, case.domain)[0]


def reference(
    oracle: Cosmos3OmniTransformer, case: Case, streams: list[Stream], ids: Tensor
) -> list[Tensor]:
    """One forward with the packing of diffusers' own pipeline."""
    pipeline = SimpleNamespace(transformer=oracle, vae_scale_factor_temporal=4)
    latents = {stream.name: stream.x for stream in streams}
    text = Cosmos3OmniPipeline._prepare_text_segment(pipeline, ids.tolist(), CPU)
    start = text.pop("vision_start_temporal_offset")
    vision = Cosmos3OmniPipeline._prepare_vision_segment(
        pipeline,
        latents["vision"],
        has_image_condition=False,
        mrope_offset=start,
        vision_fps=case.fps,
        curr=len(ids),
        device=CPU,
        condition_frame_indexes=list(case.clean_frames),
    )
    segments, length = [text, vision], len(ids) + vision["num_vision_tokens"]
    arguments = {
        "vision_tokens": [latents["vision"]],
        "vision_timesteps": torch.full((vision["num_noisy_vision_tokens"],), float(case.timestep)),
    }
    if case.sound:
        fps = oracle.config.sound_latent_fps
        sound = Cosmos3OmniPipeline._prepare_sound_segment(
            pipeline, latents["sound"], start, fps, length, CPU
        )
        noisy = 0 if case.given_sound else case.sound
        if case.given_sound:  # which its pipeline has no words for
            for field in ("mse_loss_indexes", "noisy_frame_indexes"):
                none = torch.zeros(0, dtype=torch.long)
                sound[f"sound_{field}"] = [none] if field == "noisy_frame_indexes" else none
        segments, length = [*segments, sound], length + case.sound
        arguments |= {
            "sound_tokens": [latents["sound"]],
            "sound_timesteps": torch.full((noisy,), float(case.timestep)),
        }
    if case.rows:
        action = Cosmos3OmniPipeline._prepare_action_segment(
            pipeline, latents["action"], list(case.clean_rows), start, case.fps, length, CPU
        )
        segments, length = [*segments, action], length + case.rows
        arguments |= {
            "action_tokens": [latents["action"]],
            "action_timesteps": torch.full(
                (action["num_noisy_action_tokens"],), float(case.timestep)
            ),
            "action_domain_ids": [torch.tensor(case.domain)],
        }
    ids_3S = [value for s in segments for key, value in s.items() if key.endswith("_mrope_ids")]
    for segment in segments:
        arguments |= {key: value for key, value in segment.items() if key in ACCEPTED}
    output = oracle(position_ids=torch.cat(ids_3S, dim=1), sequence_length=length, **arguments)
    found = {"vision": output.sample, "sound": output.sound, "action": output.action}
    return [found[stream.name][0] for stream in streams]


ACCEPTED = {"input_ids", "text_indexes", "und_len"} | {
    f"{kind}_{field}"
    for kind in ("vision", "sound", "action")
    for field in ("token_shapes", "sequence_indexes", "mse_loss_indexes", "noisy_frame_indexes")
}
