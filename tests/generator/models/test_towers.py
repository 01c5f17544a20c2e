"""The two towers: what depends on what, what is computed how often, and on how many ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import Ranks
from torch import Tensor

from vllm_cosmos3.checkpoint.config import TransformerConfig, read_config
from vllm_cosmos3.checkpoint.tensors import parameters, transformer_tensors
from vllm_cosmos3.checkpoint.weights import choose_kernels, load_dummy_weights, load_weights
from vllm_cosmos3.engine_options import ParallelConfig
from vllm_cosmos3.generator.models.modalities import frame_mask
from vllm_cosmos3.generator.models.rope import Rope, rotate
from vllm_cosmos3.generator.models.transformer import (
    Context,
    TextKV,
    TimeEmbedding,
    Transformer,
    join,
    sinusoid,
)
from vllm_cosmos3.generator.models.weight_tables import weight_table
from vllm_cosmos3.generator.sampling.guidance import guide
from vllm_cosmos3.generator.sampling.packing import Stream, start_stream
from vllm_cosmos3.generator.sampling.positions import (
    action_positions,
    generation_start,
    sound_positions,
    vision_positions,
)
from vllm_cosmos3.generator.sampling.schedule import native
from vllm_cosmos3.generator.sampling.solvers import SOLVERS, SolverState
from vllm_cosmos3.parallel.attention import make_attend
from vllm_cosmos3.parallel.mesh import Mesh, close_mesh, init_mesh

CPU = torch.device("cpu")
IDS = torch.arange(7, 30)


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    mesh = init_mesh(ParallelConfig())
    yield mesh
    close_mesh(mesh)


@pytest.fixture(scope="module")
def model(tiny_checkpoint_fp32: Path, mesh: Mesh) -> Transformer:
    return load(mesh, tiny_checkpoint_fp32)


def build(mesh: Mesh, config: TransformerConfig, dtype: torch.dtype) -> Transformer:
    attend = make_attend(device=CPU, dtype=dtype, head_dim=config.head_dim)
    return Transformer(config, mesh, attend, dtype=dtype, device=CPU)


def load(mesh: Mesh, folder: Path) -> Transformer:
    config = read_config(folder).transformer
    model = build(mesh, config, torch.float32)
    load_weights(model, weight_table(config), folder / "transformer", transformer_tensors(config))
    return model


def streams(width: int = 5, *, rows: int = 4) -> list[Stream]:
    """Video of an odd size with its first frame given, sound, and actions with a given row."""
    generator = torch.Generator().manual_seed(0)
    free_rows = torch.ones(rows, 64, dtype=torch.bool)
    free_rows[0] = False
    shapes = {
        "vision": ((1, 48, 3, 3, width), frame_mask(3, (0,))),
        "sound": ((64, 6), torch.ones(1, 6, dtype=torch.bool)),
        "action": ((rows, 64), free_rows),
    }
    return [
        start_stream(
            name,
            noise=torch.randn(shape, generator=generator),
            clean_latent=torch.randn(shape, generator=generator),
            denoise_mask=free,
        )
        for name, (shape, free) in shapes.items()
        if 0 not in shape
    ]


def places(
    config: TransformerConfig, width: int = 5, *, rows: int = 4, texts: int = len(IDS)
) -> Tensor:
    start = generation_start(texts, config)
    return torch.cat(
        [
            vision_positions(3, 2, -(-width // 2), start=start, fps=15.0, config=config),
            sound_positions(6, start=start, config=config),
            action_positions(rows, start=start, fps=15.0, first=1, config=config),
        ],
        dim=1,
    )


@torch.inference_mode()
def run(
    model: Transformer, t: float = 500.0, *, width: int = 5, rows: int = 4
) -> tuple[Tensor, ...]:
    rope = model.rope(places(model.config, width, rows=rows))
    text = model.understand(IDS)
    context = Context(texts=(text,), rope=rope)
    return model(streams(width, rows=rows), context, torch.tensor(t), 7)[0]


def run_on_rank(mesh: Mesh, folder: Path, width: int, rows: int) -> list[Tensor]:
    return list(run(load(mesh, folder), width=width, rows=rows))


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(ulysses_degree=2),
        ParallelConfig(tensor_parallel_size=2),
    ],
    ids=["ulysses", "tensor"],
)
@pytest.mark.parametrize(("width", "rows"), [(5, 4), (4, 5)], ids=["even count", "odd count"])
def test_two_ranks_equal_one(
    parallel: ParallelConfig,
    width: int,
    rows: int,
    ranks: Ranks,
    model: Transformer,
    tiny_checkpoint_fp32: Path,
) -> None:
    expected = run(model, width=width, rows=rows)
    for result in ranks(parallel, run_on_rank, tiny_checkpoint_fp32, width, rows):
        for a, b in zip(result, expected, strict=True):
            assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@torch.inference_mode()
def test_text_is_read_once_for_all_steps(model: Transformer) -> None:
    calls = []
    hook = model.understanding.register_forward_hook(lambda *_: calls.append(1))
    text = model.understand(IDS)
    before = [layer.clone() for layer in text.layers]
    context = Context(texts=(text,), rope=model.rope(places(model.config)))
    results = [model(streams(), context, torch.tensor(t), 7)[0] for t in (999.0, 500.0, 1.0)]
    hook.remove()
    assert len(calls) == 1
    assert not torch.equal(results[0][0], results[2][0])
    for layer, layer_before in zip(text.layers, before, strict=True):
        assert torch.equal(layer, layer_before)


def run_joined(model: Transformer, width: int) -> tuple[tuple[Tensor, ...], ...]:
    """Two branches side by side, and then each alone."""
    rope = model.rope(places(model.config, width))
    later = model.rope(places(model.config, width, texts=5))
    contexts = [
        Context(texts=(model.understand(IDS),), rope=rope),
        Context(texts=(model.understand(IDS.flip(0)[:5]),), rope=later),
    ]
    timestep, given = torch.tensor(500.0), streams(width)
    together = model(given, join(contexts), timestep, 7)
    return (*together, *(model(given, context, timestep, 7)[0] for context in contexts))


@torch.inference_mode()
def run_joined_on_rank(mesh: Mesh, folder: Path, width: int) -> tuple[tuple[Tensor, ...], ...]:
    return run_joined(load(mesh, folder), width)


@pytest.mark.parametrize("width", [4, 5])
@torch.inference_mode()
def test_branches_side_by_side_do_not_see_each_other(
    width: int, model: Transformer, ranks: Ranks, tiny_checkpoint_fp32: Path
) -> None:
    first, second, first_alone, second_alone = expected = run_joined(model, width)
    for joined, alone in ((first, first_alone), (second, second_alone)):
        for a, b in zip(joined, alone, strict=True):
            assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    assert not torch.allclose(first[0], second[0], atol=1e-3)
    two = ParallelConfig(ulysses_degree=2)
    for result in ranks(two, run_joined_on_rank, tiny_checkpoint_fp32, width):
        for got, wanted in zip(result, expected, strict=True):
            for a, b in zip(got, wanted, strict=True):
                assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@torch.inference_mode()
def test_earlier_text_does_not_see_later_text(model: Transformer) -> None:
    whole, part = model.understand(IDS), model.understand(IDS[:9])
    for kv, kv_part in zip(whole.layers, part.layers, strict=True):
        torch.testing.assert_close(kv[:9], kv_part, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(kv[1:9], kv_part[:8], atol=1e-3)


def test_given_values_have_no_velocity(model: Transformer) -> None:
    vision, sound, action = run(model)
    assert torch.count_nonzero(vision[:, :, 0]) == 0
    assert torch.count_nonzero(action[0]) == 0
    for velocity in (vision[:, :, 1:], sound, action[1:]):
        assert torch.count_nonzero(velocity) == velocity.numel()


@torch.inference_mode()
def test_no_step_depends_on_a_value(tiny_checkpoint: Path, mesh: Mesh) -> None:
    """Tensors without values pass: no host synchronisation, no branch on data, in either tower."""
    config, meta = read_config(tiny_checkpoint).transformer, torch.device("meta")
    attend = make_attend(device=CPU, dtype=torch.bfloat16, head_dim=config.head_dim)
    model = Transformer(config, mesh, attend, dtype=torch.bfloat16, device=meta)
    choose_kernels(model)
    moved = [
        replace(
            s,
            x=s.x.to(meta),
            clean_latent=s.clean_latent.to(meta),
            denoise_mask=s.denoise_mask.to(meta),
        )
        for s in streams()
    ]
    text = model.understand(IDS.to(meta))
    context = Context(texts=(text,), rope=model.rope(places(config)))
    (velocities,) = model(moved, context, torch.tensor(3.0, device=meta), 7)
    assert [v.shape for v in velocities] == [s.x.shape for s in moved]


def test_every_parameter_has_its_tensors(model: Transformer, mesh: Mesh) -> None:
    table = weight_table(model.config)
    fresh = build(mesh, model.config, torch.float32)
    assert {target.parameter for target in table.values()} == dict(fresh.named_parameters()).keys()
    unused = transformer_tensors(model.config).keys() - table.keys()
    last = f"layers.{model.config.num_hidden_layers - 1}"
    assert {name for name in unused if not name.startswith(last)} == {
        "lm_head.weight",
        "norm.weight",
    }
    assert not any("moe_gen" in name or "add" in name for name in unused)


@pytest.mark.parametrize(
    ("sizes", "published"),
    [
        ((4096, 36, 32, 8, 12288), 15_173_669_120),
        ((5120, 64, 64, 8, 25600), 64_019_736_832),
    ],
    ids=["Nano", "Super"],
)
def test_parameters_of_the_published_models(
    sizes: tuple[int, ...], published: int, model: Transformer, mesh: Mesh
) -> None:
    """All parameters that the generator needs, and no other."""
    width, layers, heads, kv_heads, mlp = sizes
    config = replace(
        model.config,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128,
        intermediate_size=mlp,
        vocab_size=151936,
    )
    attend = make_attend(device=CPU, dtype=torch.bfloat16, head_dim=128)
    meta = torch.device("meta")
    full = Transformer(config, mesh, attend, dtype=torch.bfloat16, device=meta)
    last = 2 * width * heads * 128 + 3 * width * mlp + 128 + width  # all but its keys and values
    unused = config.vocab_size * width + width + last  # with the head and the norm of the reasoner
    assert parameters(transformer_tensors(config)) == published
    assert sum(p.numel() for p in full.parameters()) == published - unused


@torch.inference_mode()
def test_dummy_weights_stay_finite_over_a_request(tiny_checkpoint: Path, mesh: Mesh) -> None:
    config = read_config(tiny_checkpoint).transformer
    model = build(mesh, config, torch.bfloat16)
    load_dummy_weights(model, weight_table(config), transformer_tensors(config), device=CPU)
    texts = [model.understand(IDS), model.understand(IDS.flip(0))]
    rope, schedule, current = model.rope(places(config)), native(35, 10.0), streams()
    states = [SolverState() for _ in current]
    for index, t in enumerate(schedule.timesteps):
        predict = partial(velocities_of, model, current, texts, rope, torch.tensor(t))
        velocities = guide(predict, (6.0,), mesh.cfg, tuple(s.x for s in current))
        stepped = [
            SOLVERS["unipc"].step(s.x, v, state, schedule.sigmas, index, None)
            for s, v, state in zip(current, velocities, states, strict=True)
        ]
        states = [state for _, state in stepped]
        current = [s.apply_clean(x) for s, (x, _) in zip(current, stepped, strict=True)]
    for stream in current:
        assert stream.x.isfinite().all()
        assert 0.1 < stream.x[stream.denoise_mask.expand_as(stream.x)].std() < 100


def velocities_of(
    model: Transformer,
    current: list[Stream],
    texts: list[TextKV],
    rope: Rope,
    timestep: Tensor,
    branches: Sequence[int],
) -> tuple[tuple[Tensor, ...], ...]:
    contexts = [Context(texts=(texts[branch],), rope=rope) for branch in branches]
    return model(current, join(contexts), timestep, 7)


def dummy_on_rank(mesh: Mesh, folder: Path) -> list[Tensor]:
    config = read_config(folder).transformer
    model = build(mesh, config, torch.float32)
    load_dummy_weights(model, weight_table(config), transformer_tensors(config), device=CPU)
    return list(run(model))


def test_dummy_weights_do_not_depend_on_the_mesh(
    ranks: Ranks, tiny_checkpoint: Path, mesh: Mesh
) -> None:
    expected = dummy_on_rank(mesh, tiny_checkpoint)
    for result in ranks(ParallelConfig(tensor_parallel_size=2), dummy_on_rank, tiny_checkpoint):
        for a, b in zip(result, expected, strict=True):
            assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_sinusoid_has_the_published_values() -> None:
    e = sinusoid(torch.tensor(999.0) * 0.001)
    assert e.shape == (256,)
    cosines, sines = (
        torch.tensor([0.541143, 0.598121, 0.648565]),
        torch.tensor([0.840930, 0.801406, 0.761159]),
    )
    torch.testing.assert_close(e[:3], cosines, atol=1e-6, rtol=0)
    torch.testing.assert_close(e[128:131], sines, atol=1e-6, rtol=0)


def test_time_embedding_is_float32_in_a_bfloat16_model(tiny_checkpoint: Path, mesh: Mesh) -> None:
    """bfloat16 knows no 999: the last steps of a schedule would share a timestep."""
    model = build(mesh, read_config(tiny_checkpoint).transformer, torch.bfloat16)
    assert isinstance(model.time, TimeEmbedding)
    assert {p.dtype for p in model.time.parameters()} == {torch.float32}
    assert {p.dtype for p in model.understanding.parameters()} == {torch.bfloat16}
    assert not torch.equal(sinusoid(torch.tensor(0.999)), sinusoid(torch.tensor(0.998)))


@settings(max_examples=30, deadline=None)
@given(angle=st.floats(-100, 100), shift=st.floats(-100, 100))
def test_rotation_keeps_lengths_and_relative_angles(angle: float, shift: float) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(1, 2, 8, generator=generator, dtype=torch.float64) for _ in range(2))

    def at(x: Tensor, angle: float) -> Tensor:
        turn = torch.full((1, 4), angle, dtype=torch.float64)
        table = torch.cat([turn.cos(), turn.sin()], dim=1)
        return rotate(x, Rope(table=table, rows=torch.arange(1), length=1))

    torch.testing.assert_close(at(q, angle).norm(dim=-1), q.norm(dim=-1))
    moved = (at(q, angle + shift) * at(k, shift)).sum(-1)
    torch.testing.assert_close(moved, (at(q, angle) * k).sum(-1), atol=1e-9, rtol=0)
