"""The four calls: what they compute once, what they keep apart, and what they leave untouched."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vllm_cosmos3.checkpoint.synthetic import write_checkpoint
from vllm_cosmos3.engine_options import EngineConfig, ParallelConfig
from vllm_cosmos3.errors import CheckpointError
from vllm_cosmos3.generator import frames, prediction, text
from vllm_cosmos3.generator import pipeline as pipeline_module
from vllm_cosmos3.generator.models import modalities
from vllm_cosmos3.generator.models.text_cache import TextKVCache
from vllm_cosmos3.generator.output import Output
from vllm_cosmos3.generator.pipeline import Pipeline
from vllm_cosmos3.media import Clip, read_video, write_video
from vllm_cosmos3.parallel.mesh import close_mesh, init_mesh
from vllm_cosmos3.request.planner import make_plan
from vllm_cosmos3.request.request import from_fields

SMALL = {
    "prompt": "A paper boat",
    "negative_prompt": "blurry",
    "size": "96x64",
    "num_frames": 9,
    "num_inference_steps": 3,
    "seed": 4,
    "output_type": "latent",
}
PICTURE = np.random.RandomState(0).randint(0, 256, (64, 96, 3), dtype=np.uint8)


def load(folder: Path) -> Pipeline:
    mesh = init_mesh(ParallelConfig())
    try:
        return Pipeline.load(EngineConfig(model=folder, dtype="float32"), mesh, "cpu")
    finally:
        close_mesh(mesh)


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint_fp32: Path) -> Pipeline:
    return load(tiny_checkpoint_fp32)


@pytest.fixture
def texts(pipeline: Pipeline) -> Iterator[list[int]]:
    """Lengths of the texts that the understanding tower has read, none of them before."""
    lengths: list[int] = []
    pipeline.texts = TextKVCache(pipeline_module.TEXT_BYTES)
    hook = pipeline.transformer.understanding.register_forward_hook(
        lambda _, inputs, __: lengths.append(len(inputs[0]))
    )
    yield lengths
    hook.remove()


def run(pipeline: Pipeline, **fields: Any) -> Output:
    state = pipeline.encode(
        make_plan(from_fields({**SMALL, **fields}), pipeline.model, pipeline.tokenizer)
    )
    while not state.done:
        pipeline.step(state)
    pipeline.decode(state)
    return pipeline.finish(state)


def vision(output: Output) -> np.ndarray:
    assert output.latents is not None
    return output.latents["vision"]


def test_no_mode_below_the_plan() -> None:
    for module in (pipeline_module, prediction, text, frames, modalities):
        source = Path(str(module.__file__)).read_text()
        assert not re.search(r"\bmode\b|is_image|i2v|t2v", source.split('"""', 2)[2]), module


def test_same_seed_same_bits(pipeline: Pipeline) -> None:
    fields = {"generate_sound": True}
    first, second = run(pipeline, **fields), run(pipeline, **fields)
    assert first.latents is not None
    assert second.latents is not None
    for name in ("vision", "sound"):
        assert (first.latents[name] == second.latents[name]).all()
    assert np.abs(vision(run(pipeline, **fields, seed=5)) - vision(first)).max() > 0.1


@pytest.mark.parametrize(
    ("fields", "branches"),
    [
        ({}, 2),
        ({"n": 3}, 2),
        ({"guidance_scale": 1}, 1),
        ({"guidance_interval": [0, 1]}, 1),
        ({"guidance_interval": [990, 1000]}, 2),
    ],
)
def test_each_text_is_read_once(
    pipeline: Pipeline, texts: list[int], fields: dict[str, Any], branches: int
) -> None:
    plan = make_plan(from_fields({**SMALL, **fields}), pipeline.model, pipeline.tokenizer)
    first = run(pipeline, **fields)
    assert texts == [len(ids) for ids in plan.token_ids][:branches]
    again = run(pipeline, **fields)
    assert len(texts) == branches
    assert (vision(again) == vision(first)).all()


@pytest.mark.parametrize("fields", [{}, {"generate_sound": True, "image": PICTURE}])
def test_branches_may_be_evaluated_together_or_one_by_one(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    calls: list[int] = []
    hook = pipeline.transformer.register_forward_hook(lambda *_: calls.append(1))
    together = run(pipeline, **fields)
    steps = len(calls)
    monkeypatch.setattr(prediction, "JOINED_TOKENS", 0)
    one_by_one = run(pipeline, **fields)
    hook.remove()
    assert len(calls) - steps == 2 * steps
    scale = np.abs(vision(one_by_one)).max()
    assert np.abs(vision(together) - vision(one_by_one)).max() <= 1e-5 * scale


@pytest.mark.parametrize(
    ("fields", "steps"), [({"n": 2}, [6]), ({"num_chunks": 2}, [3, 3]), ({}, [3])]
)
def test_forwards_are_recorded_by_how_often_they_are_used(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], steps: list[int]
) -> None:
    """Samples share them, chunks do not."""
    asked: list[int] = []
    monkeypatch.setattr(
        prediction, "launches_matter", lambda _, steps, *__: bool(asked.append(steps))
    )
    run(pipeline, **fields)
    assert asked == steps


def test_a_clip_is_written_while_it_is_decoded(pipeline: Pipeline, tmp_path: Path) -> None:
    plan = make_plan(
        from_fields({**SMALL, "output_type": "pixels", "generate_sound": True}),
        pipeline.model,
        pipeline.tokenizer,
    )
    clip = Clip(path=tmp_path / "boat.mp4", crf=0)
    state = pipeline.encode(plan)
    while not state.done:
        pipeline.step(state)
    pipeline.decode(state, clip)
    output = pipeline.finish(state)
    assert output.video is not None
    written = clip.path.read_bytes()
    assert output.save(clip.path, crf=0) == [clip.path]
    assert clip.path.read_bytes() == written  # nothing was left to do
    again = tmp_path / "again.mp4"
    output.save(again, crf=0)
    frames, expected = (read_video(file, frames=len(output.video)) for file in (clip.path, again))
    assert (frames == expected).all()
    assert len(frames) == SMALL["num_frames"]


def test_several_results_have_no_clip(pipeline: Pipeline, tmp_path: Path) -> None:
    state = pipeline.encode(
        make_plan(
            from_fields({**SMALL, "output_type": "pixels", "n": 2}),
            pipeline.model,
            pipeline.tokenizer,
        )
    )
    while not state.done:
        pipeline.step(state)
    pipeline.decode(state, Clip(path=tmp_path / "boat.mp4"))
    assert [sample.clip for sample in pipeline.finish(state).samples] == [None, None]
    assert not list(tmp_path.iterdir())


def test_several_results_are_those_of_their_seeds(pipeline: Pipeline) -> None:
    together = run(pipeline, n=3)
    assert [sample.seed for sample in together.samples] == [4, 5, 6]
    for sample in together.samples:
        assert sample.latents is not None
        assert (sample.latents["vision"] == vision(run(pipeline, seed=sample.seed))).all()


def test_requests_may_take_turns(pipeline: Pipeline) -> None:
    requests: list[dict[str, Any]] = [{}, {"image": PICTURE, "size": "80x80", "seed": 9}]
    states = [
        pipeline.encode(make_plan(from_fields({**SMALL, **r}), pipeline.model, pipeline.tokenizer))
        for r in requests
    ]
    while not states[0].done:
        for state in states:
            pipeline.step(state)
    for state, fields in zip(states, requests, strict=True):
        pipeline.decode(state)
        assert (vision(pipeline.finish(state)) == vision(run(pipeline, **fields))).all()


def test_given_frames_come_back_as_they_were(pipeline: Pipeline) -> None:
    pixels = torch.from_numpy(PICTURE).permute(2, 0, 1)[None, :, None].float() / 127.5 - 1
    encoded = pipeline.vae.encode(pixels).numpy()
    noise = np.random.RandomState(1).standard_normal((1, 48, 3, 4, 6)).astype(np.float32)
    for fields in ({}, {"latents": {"vision": noise}}):
        latents = vision(run(pipeline, image=PICTURE, **fields))
        assert (latents[:, :, 0] == encoded[:, :, 0]).all()
        assert (latents[:, :, 1] != encoded[:, :, 0]).any()


def test_only_the_needed_pixels_are_encoded(pipeline: Pipeline) -> None:
    """The encoder is causal: a video-to-video request encodes the prefix alone, others nothing."""
    seen: list[int] = []
    hook = pipeline.vae.encoder.register_forward_hook(
        lambda _, inputs, __: seen.append(inputs[0].shape[2])
    )
    clip = np.stack([PICTURE] * 20)
    for fields in ({}, {"num_frames": 1}, {"video": clip, "num_frames": 29}):
        run(pipeline, **fields)
    hook.remove()
    assert seen == [1, 4]


def test_image_is_decoded_as_one_frame(pipeline: Pipeline) -> None:
    output = run(pipeline, num_frames=1, output_type="pixels")
    assert output.video is None
    assert output.image is not None
    assert (output.image.shape, output.image.dtype) == ((64, 96, 3), np.uint8)


def test_actions_beside_a_picture_are_kept(pipeline: Pipeline, tmp_path: Path) -> None:
    """Fewer than four actions make no second frame."""
    fields = {"action_mode": "policy", "domain_name": "umi", "action_chunk_size": 3}
    output = run(pipeline, image=PICTURE, output_type="pixels", num_frames=None, **fields)
    assert output.image is not None
    assert output.action is not None
    assert output.action.shape == (3, 10)
    assert output.action.std() > 0
    picture, rows = output.save(tmp_path / "go")
    assert (picture.name, rows.name) == ("go.png", "go_action.json")
    assert np.array_equal(np.array(json.loads(rows.read_text()), np.float32), output.action)


def test_latents_are_not_decoded(pipeline: Pipeline) -> None:
    decoded: list[object] = []
    hooks = [
        module.register_forward_hook(lambda *_: decoded.append(1))
        for module in (pipeline.vae.decoder, pipeline.coders["sound"].decoder)
    ]
    output = run(pipeline, generate_sound=True)
    for hook in hooks:
        hook.remove()
    assert not decoded
    assert (output.video, output.image, output.sound) == (None, None, None)
    assert output.latents is not None
    assert {name: (x.shape, x.dtype) for name, x in output.latents.items()} == {
        "vision": ((1, 48, 3, 4, 6), np.float32),
        "sound": ((64, 10), np.float32),
    }


def test_a_video_follows_the_sound_that_is_given(pipeline: Pipeline, tmp_path: Path) -> None:
    loud, quiet = tmp_path / "loud.mp4", tmp_path / "quiet.mp4"
    tone = (0.5 * np.sin(np.arange(48_000) / 20)).astype(np.float32)
    frames = np.zeros((24, 16, 16, 3), np.uint8)
    write_video(loud, frames, fps=24, sound=np.stack([tone, tone]))
    write_video(quiet, frames, fps=24, sound=np.zeros((2, 48_000), np.float32))
    one, other = (run(pipeline, sound_path=path) for path in (loud, quiet))
    assert np.abs(vision(one) - vision(other)).max() > 0.01
    assert one.latents is not None
    given = make_plan(
        from_fields(SMALL | {"sound_path": loud}), pipeline.model, pipeline.tokenizer
    ).sound
    assert given is not None
    encoded = pipeline.coders["sound"].encode(torch.from_numpy(given))
    assert np.array_equal(one.latents["sound"], encoded.numpy())  # known, so not denoised
    made = run(pipeline, sound_path=loud, output_type="pixels")
    assert made.sound is not None
    assert np.array_equal(made.sound, given)  # and not through the autoencoder


def test_an_edit_depends_on_the_picture(pipeline: Pipeline) -> None:
    fields = {"num_frames": 1, "output_type": "pixels", "image": PICTURE}
    first, again = run(pipeline, **fields), run(pipeline, **fields)
    assert first.image is not None
    assert first.image.shape == (64, 96, 3)
    assert np.array_equal(first.image, again.image)
    other = run(pipeline, **fields | {"image": PICTURE[::-1].copy()})
    assert not np.array_equal(first.image, other.image)


def test_finish_reports_seconds_and_memory(pipeline: Pipeline) -> None:
    output = run(pipeline, output_type="pixels", generate_sound=True)
    names = ["text", "vae_encode", "denoise", "vae_decode", "sound", "to_cpu", "per_step"]
    assert list(output.timings) == names
    assert output.timings["denoise"] == pytest.approx(3 * output.timings["per_step"])
    assert output.peak_memory > 2**20


def test_noise_rules_and_schedules_differ(pipeline: Pipeline) -> None:
    results = [
        vision(run(pipeline, **fields))
        for fields in ({}, {"noise": "torch"}, {"schedule": "karras"}, {"schedule": "diffusers"})
    ]
    for i, one in enumerate(results):
        assert np.isfinite(one).all()
        for other in results[:i]:
            assert np.abs(one - other).max() > 1e-3


def test_distilled_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four steps without guidance, with fresh noise at each but the last."""
    folder = tmp_path / "distilled"
    write_checkpoint(folder, kind="distilled-i2v", dtype="float32")
    distilled = load(folder)
    plan = make_plan(
        from_fields({**SMALL, "num_inference_steps": None, "image": PICTURE}),
        distilled.model,
        distilled.tokenizer,
    )
    state = distilled.encode(plan)
    assert state.schedule.sigmas == pytest.approx((1.0, 0.9375, 0.8333333, 0.625, 0))
    while not state.done:
        distilled.step(state)
    distilled.decode(state)
    first = vision(distilled.finish(state))
    again = run(distilled, num_inference_steps=4, image=PICTURE)
    assert (vision(again) == first).all()
    drawn: list[dict[str, torch.Tensor]] = []
    for name in ("initial_noise", "step_noise"):
        draw = getattr(pipeline_module, name)
        monkeypatch.setattr(
            pipeline_module,
            name,
            lambda *args, draw=draw, **more: (drawn.append(draw(*args, **more)), drawn[-1])[1],
        )
    for rule in ("numpy", "torch"):
        drawn.clear()
        chunks = vision(
            run(distilled, num_inference_steps=4, image=PICTURE, num_chunks=2, noise=rule)
        )
        assert (rule != "numpy") or (chunks[:, :, :3] == first).all()
        assert len({tuple(noise["vision"].flatten().tolist()) for noise in drawn}) == 2 * (1 + 4)


def test_incomplete_checkpoint_is_one_error(tiny_checkpoint_fp32: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint_fp32, folder)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"12345678")
    with pytest.raises(CheckpointError, match="vae"):
        load(folder)


def test_controls_lie_beside_the_video_or_before_it(
    pipeline: Pipeline, texts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions of each branch, and one reading of the prompt for the two that have it."""
    clip = np.zeros((9, 64, 96, 3), np.uint8)
    laid: list[torch.Tensor] = []
    rope = pipeline.transformer.rope
    monkeypatch.setattr(
        pipeline.transformer,
        "rope",
        lambda at, controls=(): (laid.append(at), rope(at, controls))[1],
    )
    fields = {**SMALL, "seg": clip, "edge": clip, "control_guidance": 2.0, "fps": 24.0}
    for shared in (True, False):
        request = from_fields(fields | {"share_vision_temporal_positions": shared})
        plan = make_plan(request, pipeline.model, pipeline.tokenizer)
        laid.clear()
        pipeline.encode(plan)
        full, bare, _ = laid
        count = bare.shape[1]
        times = [part[0] for part in full.split(count, dim=1)]
        assert len(times) == 3
        assert float(bare[0].min()) == len(plan.token_ids[0]) + 15000
        for index, time in enumerate(times):
            start = (
                bare[0] if shared else bare[0] + index * (float(bare[0].max() - bare[0].min()) + 1)
            )
            assert torch.equal(time, start)
        assert all(torch.equal(part[1:], bare[1:]) for part in full.split(count, dim=1))
    assert texts == [len(plan.token_ids[0]), len(plan.token_ids[2])] * 2
