"""Control clips, how they are computed and cut into chunks, and what they do to a request."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_cosmos3 import media
from vllm_cosmos3.checkpoint.config import ModelConfig, read_config
from vllm_cosmos3.engine import Cosmos3
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.generator.sampling.noise import initial_noise
from vllm_cosmos3.media_budget import MediaBudget
from vllm_cosmos3.request import planner, prompts
from vllm_cosmos3.request.controls import PRESETS
from vllm_cosmos3.request.plan import Plan
from vllm_cosmos3.request.planner import make_plan
from vllm_cosmos3.request.request import from_fields
from vllm_cosmos3.request.transfer import Chunks, blurred, edges, padded

SMALL = {"size": "96x64", "num_inference_steps": 2, "guidance_scale": 1.0, "seed": 1}


def clip(frames: int, seed: int = 0, *, height: int = 64, width: int = 96) -> np.ndarray:
    shape = (frames, height // 8, width // 8, 3)
    blocks = np.random.RandomState(seed).randint(0, 256, shape, dtype=np.uint8)
    return blocks.repeat(8, axis=1).repeat(8, axis=2)


@pytest.fixture(scope="module")
def model(tiny_checkpoint_fp32: Path) -> ModelConfig:
    return read_config(tiny_checkpoint_fp32)


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint_fp32: Path) -> prompts.Tokenizer:
    return prompts.load_tokenizer(tiny_checkpoint_fp32)


@pytest.fixture(scope="module")
def engine(tiny_checkpoint_fp32: Path) -> Iterator[Cosmos3]:
    with Cosmos3(tiny_checkpoint_fp32, dtype="float32", device="cpu") as model:
        yield model


# Chunks.


@given(st.integers(1, 60), st.integers(1, 200))
def test_padding_goes_back_and_forth(count: int, length: int) -> None:
    order = padded(count, length)
    assert len(order) == max(count, length)
    assert order[:count] == list(range(count))
    assert all(abs(a - b) <= 1 for a, b in itertools.pairwise(order))
    assert padded(4, 9) == [0, 1, 2, 3, 3, 2, 1, 1, 2]
    assert padded(1, 3) == [0, 0, 0]


@given(st.integers(2, 500), st.integers(0, 25).map(lambda k: 4 * k + 5), st.data())
def test_chunks_make_every_frame_once(total: int, frames: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, frames - 1))
    chunks = Chunks(total=total, frames=frames, overlap=overlap)
    windows = [range(total)[chunks.window(index)] for index in range(chunks.count)]
    assert all(len(window) == frames for window in windows[:-1])
    made = [*windows[0]]
    for before, window in itertools.pairwise(windows):
        assert [*before][len(before) - overlap :] == [*window][:overlap]
        made += [*window][overlap:]
    assert made == list(range(total))


# Pictures.


def test_edges_are_where_levels_change() -> None:
    frame = np.zeros((40, 60, 3), np.uint8)
    frame[10:30, 20:40] = 200
    found = edges(frame, "medium")
    assert set(np.unique(found)) == {0, 255}
    assert (found[..., 0] == found[..., 2]).all()
    rows, columns = np.nonzero(found[..., 0])
    assert (rows.min(), columns.min()) >= (8, 18)
    assert (rows.max(), columns.max()) <= (31, 41)
    assert not found[13:27, 23:37].any()
    noisy = clip(1)[0] // 2
    strengths = [int(edges(noisy, preset).sum()) for preset in PRESETS]
    assert strengths == sorted(strengths, reverse=True)
    assert strengths[0] > strengths[-1]


@pytest.mark.parametrize("size", [(64, 96), (45, 31), (9, 7)])
def test_blur_takes_detail_away(size: tuple[int, int]) -> None:
    frame = np.random.RandomState(0).randint(0, 256, (*size, 3), dtype=np.uint8)
    assert (blurred(frame, "none") == frame).all()
    spreads = [float(blurred(frame, preset).std()) for preset in ("none", "low", "very_high")]
    assert spreads == sorted(spreads, reverse=True)
    assert blurred(frame, "medium").shape == frame.shape
    flat = np.full((*size, 3), 77, np.uint8)
    for preset in PRESETS:
        assert (blurred(flat, preset) == 77).all()


# Plans.


def plan(model: ModelConfig, tokenizer: prompts.Tokenizer, **fields: Any) -> Plan:
    return make_plan(from_fields({"prompt": "a boat", **fields}), model, tokenizer)


def test_the_clip_decides_on_size_length_and_rate(
    model: ModelConfig, tokenizer: prompts.Tokenizer, tmp_path: Path
) -> None:
    media.write_video(tmp_path / "in.mp4", clip(11, height=96, width=64), fps=12)
    p = plan(model, tokenizer, edge=True, video=tmp_path / "in.mp4", image_size=256)
    known = p.effective
    assert (known["mode"], known["size"], known["num_frames"]) == ("transfer", "192x320", 11)
    assert (p.parameters.fps, p.parameters.num_frames, known["num_video_frames_per_chunk"]) == (
        12.0,
        11,
        13,
    )
    control, target = p.streams
    assert control.known == (0, 1, 2, 3)
    assert (control.source.shape, target.known, target.source) == ((13, 320, 192, 3), (), None)
    assert (control.source[11] == control.source[10]).all()  # played back
    assert (control.hidden_in_branches, control.control_weight, p.seen(0), p.seen(1)) == (
        (1,),
        None,
        (0, 1),
        (1,),
    )
    assert any("loses" in warning or "not a trained" in warning for warning in p.warnings) is False


@pytest.mark.parametrize(
    ("hints", "guidance", "control", "fps", "frames", "chunk"),
    [
        (["edge"], 3.0, 1.5, 24.0, 110, 93),
        (["depth"], 3.0, 1.5, 24.0, 110, 93),
        (["seg"], 3.0, 2.0, 24.0, 110, 93),
        (["wsm"], 1.0, 3.0, 10.0, 101, 101),
        (["seg", "wsm"], 3.0, 1.0, 24.0, 110, 93),
    ],
)
def test_defaults_are_those_of_the_hint(
    model: ModelConfig,
    tokenizer: prompts.Tokenizer,
    hints: list[str],
    guidance: float,
    control: float,
    fps: float,
    frames: int,
    chunk: int,
) -> None:
    given = dict.fromkeys(hints, clip(110, height=16, width=16))
    p = plan(model, tokenizer, **given, size="16x16")
    assert (
        p.parameters.guidance_scale,
        p.parameters.control_guidance,
        p.parameters.flow_shift,
    ) == (guidance, control, 10.0)
    assert (p.parameters.fps, p.parameters.num_frames) == (fps, frames)
    assert (4 * (p.streams[0].length - 1) + 1, len(p.chunks)) == (chunk, 1 if chunk == 101 else 2)
    assert len(p.token_ids) == (2 if guidance == 1 else 3)
    assert p.token_ids[0] == p.token_ids[1]
    assert p.steps == 35 * len(p.chunks)


def test_the_prompt_names_the_controls(model: ModelConfig, tokenizer: prompts.Tokenizer) -> None:
    given = {"seg": clip(5), "edge": clip(5), "size": "96x64", "fps": 23.976}
    words = tokenizer.decode(plan(model, tokenizer, **given).token_ids[0])
    assert prompts.SYSTEM_TRANSFER in words
    assert "of 24 FPS. This video is of 64x96 resolution. Follow the edge, seg control" in words
    plain = plan(model, tokenizer, **given, emphasize_control_in_prompt=False).token_ids
    assert "Follow" not in tokenizer.decode(plain[0])
    negative = tokenizer.decode(plain[2])
    assert prompts.SYSTEM_TRANSFER in negative
    assert "Follow" not in negative


def test_chunks_overlap(model: ModelConfig, tokenizer: prompts.Tokenizer) -> None:
    control, start = clip(20), clip(7, 1)
    p = plan(
        model, tokenizer, depth=control, video=start, size="96x64", num_video_frames_per_chunk=9,
        num_conditional_frames=5, num_first_chunk_conditional_frames=6, num_frames=15,
    )  # fmt: skip
    assert [streams[0].source.shape[0] for streams in p.chunks] == [9, 9, 9]
    assert (p.chunks[1][0].source == control[4:13]).all()
    assert (p.chunks[2][0].source[:7] == control[8:15]).all()
    assert [streams[1].known for streams in p.chunks] == [(0, 1)] * 3
    assert (p.streams[1].source == start[:6]).all()
    assert (p.overlap, p.parameters.num_frames, p.chunks[1][1].source) == (5, 15, None)


def test_shares_and_positions(model: ModelConfig, tokenizer: prompts.Tokenizer) -> None:
    given = {
        "wsm": {"control": clip(5), "control_weight": 3}, "blur": clip(5), "size": "96x64",
    }  # fmt: skip
    p = plan(model, tokenizer, **given)
    assert [stream.control_weight for stream in p.streams] == [0.25, 0.75, None]
    assert p.effective["wsm"] == {"control_weight": 3.0}
    for weight in (1e308, 5e-324):
        hint = {"control": clip(5), "control_weight": weight}
        p = plan(model, tokenizer, seg=hint, edge=hint, size="96x64")
        assert [stream.control_weight for stream in p.streams] == [0.5, 0.5, None]
    p = plan(
        model, tokenizer, **given, control_attention="full", share_vision_temporal_positions=False
    )
    assert [stream.control_weight for stream in p.streams] == [None] * 3
    assert [stream.positions_after for stream in p.streams] == [False, True, True]


@pytest.mark.parametrize(
    ("fields", "field", "sentence"),
    [
        ({"num_conditional_frames": 9}, "num_conditional_frames", "num_video_frames_per_chunk=9"),
        ({"depth": b"garbage"}, "depth.control", "MP4"),
        ({"depth": "/nowhere.mp4"}, "depth.control", "a file that exists"),
        ({"edge": clip(1)}, "edge.control", "at least two"),
        ({"edge": True, "video": clip(1)}, "video", "at least two"),
        ({"edge": []}, "edge.control", "at least one frame"),
        ({"num_frames": 9, "seconds": 1}, "seconds", "num_frames=9"),
        ({"latents": {"vision": np.zeros(1)}}, "latents", "draws its own noise"),
        ({"size": "2048x2048"}, "size", "allow_untrained_size"),
        ({"num_video_frames_per_chunk": 401}, "num_video_frames_per_chunk", "at most 401"),
        ({"view_point": "ego_view"}, "view_point", "action_mode"),
        (
            {"edge": clip(5), "video": clip(12), "num_first_chunk_conditional_frames": 400,
             "num_video_frames_per_chunk": 5},
            "num_first_chunk_conditional_frames", "below 5",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(
    model: ModelConfig,
    tokenizer: prompts.Tokenizer,
    fields: dict[str, Any],
    field: str,
    sentence: str,
) -> None:
    given = {"edge": clip(12), "size": "96x64", "num_video_frames_per_chunk": 9, **fields}
    if field == "num_video_frames_per_chunk":
        given |= {"size": "1280x720"}
        sentence = "at most 301 at 1280x720"
    with pytest.raises(InvalidRequest) as refusal:
        plan(model, tokenizer, **given)
    assert refusal.value.field == field
    assert sentence in str(refusal.value)


def test_a_control_too_long_for_memory_is_refused(
    model: ModelConfig, tokenizer: prompts.Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = MediaBudget(per_request=23 * 96 * 64 * 3, total=100 * 96 * 64 * 3)
    monkeypatch.setattr(planner, "media_budget", lambda: budget)
    with pytest.raises(InvalidRequest, match="at most 10 frames long at 96x64") as refusal:
        plan(model, tokenizer, edge=clip(11), size="96x64")
    assert (refusal.value.field, refusal.value.code) == ("edge.control", "too_large")
    assert (
        plan(model, tokenizer, edge=clip(11), size="96x64", max_frames=10).parameters.num_frames
        == 10
    )


def test_what_chunks_see_is_a_part_of_the_clip_or_reserved(
    model: ModelConfig, tokenizer: prompts.Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clip that is mirrored at its end is copied for that chunk, and a short one for all."""
    frame = 96 * 64 * 3
    fields = {"edge": clip(12), "size": "96x64", "num_video_frames_per_chunk": 5}

    def planned(frames: int, **more: Any) -> Plan:
        budget = MediaBudget(per_request=frames * frame, total=100 * frame)
        monkeypatch.setattr(planner, "media_budget", lambda: budget)
        found = plan(model, tokenizer, **fields, **more)
        assert budget.used == 0
        return found

    p = planned(12 + 5)
    assert p.pixel_bytes == 3 * 5 * frame
    for part, (first, last) in zip(p.chunks, ((0, 5), (4, 9)), strict=False):
        assert (part[0].source == fields["edge"][first:last]).all()
    for frames, more, said in (
        (12 + 5 - 1, {}, ("edge.control", "too_large")),  # and how many frames would do
        (12 + 3 + 5 + 3 * 5 - 1, {"seg": clip(3)}, ("seg", "payload_too_large")),
    ):
        with pytest.raises(InvalidRequest) as refusal:
            planned(frames, **more)
        assert (refusal.value.field, refusal.value.code) == said
    planned(12 + 3 + 5 + 3 * 5, seg=clip(3))


def test_length_by_seconds_and_overlap_of_one_chunk(
    model: ModelConfig, tokenizer: prompts.Tokenizer
) -> None:
    p = plan(model, tokenizer, edge=clip(30), size="96x64", seconds=0.5, max_frames=20)
    assert (p.parameters.num_frames, len(p.chunks)) == (12, 1)
    p = plan(model, tokenizer, edge=clip(5), size="96x64", num_conditional_frames=5)
    assert (p.parameters.num_frames, len(p.chunks)) == (5, 1)


@pytest.mark.parametrize(
    ("rate", "every", "fps"), [(120, 2, 60), (90, 2, 45), (240, 4, 60), (60, 1, 60)]
)
def test_a_clip_that_is_too_fast_lasts_as_long(
    model: ModelConfig,
    tokenizer: prompts.Tokenizer,
    tmp_path: Path,
    rate: int,
    every: int,
    fps: int,
) -> None:
    frames = clip(24, height=16, width=16)
    media.write_video(tmp_path / "in.mp4", frames, fps=rate, crf=0)
    stored = media.read_video(tmp_path / "in.mp4", frames=24)
    fields = {"depth": tmp_path / "in.mp4", "seg": stored, "size": "16x16"}
    p = plan(model, tokenizer, **fields)
    assert (p.parameters.fps, p.parameters.num_frames) == (fps, -(-24 // every))
    assert p.effective["seconds"] == pytest.approx(24 / rate)
    for control in p.streams[:2]:
        assert (control.source[: p.parameters.num_frames] == stored[::every]).all()
    said = [f"one frame of {every} is used" in warning for warning in p.warnings]
    assert any(said) == (every > 1)
    half = plan(model, tokenizer, **fields, seconds=12 / rate)
    assert half.parameters.num_frames == 12 // every
    slow = plan(model, tokenizer, **fields, fps=30)
    assert (slow.parameters.num_frames, slow.parameters.fps) == (24, 30)


def test_a_clip_that_is_too_slow_needs_a_rate(
    model: ModelConfig, tokenizer: prompts.Tokenizer, tmp_path: Path
) -> None:
    media.write_video(tmp_path / "in.mp4", clip(4, height=16, width=16), fps=0.5)
    fields = {"seg": tmp_path / "in.mp4", "size": "16x16"}
    with pytest.raises(
        InvalidRequest, match=r"'0\.5 frames a second', must be at least 1"
    ) as refusal:
        plan(model, tokenizer, **fields)
    assert refusal.value.field == "seg.control"
    assert plan(model, tokenizer, **fields, fps=2).parameters.num_frames == 4


def test_warnings(model: ModelConfig, tokenizer: prompts.Tokenizer) -> None:
    p = plan(model, tokenizer, edge=clip(9), seg=clip(5), video=clip(9), size="96x64")
    assert any("seg has 5 frames and edge 9" in warning for warning in p.warnings)
    assert any("no control is computed" in warning for warning in p.warnings)


# Results.


def vision(engine: Cosmos3, **fields: Any) -> np.ndarray:
    output = engine.generate(prompt="a boat", output_type="latent", **SMALL | fields)
    return output.latents["vision"]


def test_a_control_of_no_weight_changes_nothing(engine: Cosmos3) -> None:
    """And of equal controls the mean is what one alone does."""
    one, other = clip(9, 1), clip(9, 2)
    quiet = {"emphasize_control_in_prompt": False, "control_guidance": 2.0}
    alone = vision(engine, edge=one, **quiet)
    beside = vision(engine, edge=one, seg={"control": other, "control_weight": 0}, **quiet)
    np.testing.assert_allclose(beside, alone, atol=2e-5)
    twice = vision(engine, edge=one, seg={"control": one, "control_weight": 5}, **quiet)
    np.testing.assert_allclose(twice, alone, atol=2e-5)
    both = vision(engine, edge=one, seg=other, **quiet)
    full = vision(engine, edge=one, seg=other, control_attention="full", **quiet)
    results = [alone, both, full, vision(engine, edge=other, **quiet)]
    for index, result in enumerate(results):
        assert all(np.abs(result - another).max() > 1e-3 for another in results[:index])


@pytest.mark.parametrize(("name", "compute"), [("edge", edges), ("blur", blurred)])
def test_a_computed_control_is_the_clip_of_it(engine: Cosmos3, name: str, compute: Any) -> None:
    source = clip(6)
    preset = {"edge": "preset_edge_threshold", "blur": "preset_blur_strength"}[name]
    computed = vision(engine, **{name: {preset: "high"}}, video=source)
    given = np.stack([compute(frame, "high") for frame in source])
    assert (computed == vision(engine, **{name: given})).all()
    assert np.abs(computed - vision(engine, **{name: {}}, video=source)).max() > 1e-3


def test_own_positions_are_others(engine: Cosmos3) -> None:
    apart = vision(engine, depth=clip(5), share_vision_temporal_positions=False)
    assert np.abs(apart - vision(engine, depth=clip(5))).max() > 1e-3


def test_several_results_of_several_chunks(engine: Cosmos3) -> None:
    """Each chunk has the next seed, and each result its own chunks."""
    request = {"depth": clip(8), "num_video_frames_per_chunk": 5, **SMALL}
    both = engine.generate(prompt="a boat", n=2, **request)
    assert [sample.video.shape for sample in both.samples] == [(8, 64, 96, 3)] * 2
    for sample in both.samples:
        alone = engine.generate(prompt="a boat", **request | {"seed": sample.seed})
        assert (alone.video == sample.video).all()


def test_a_chunk_that_is_given_whole_is_continued(engine: Cosmos3) -> None:
    """The later chunks are made, not left as the noise they begin with."""
    source, calls = clip(14), []
    request = {"edge": source, "video": source, "num_video_frames_per_chunk": 5, **SMALL}
    output = engine.generate(
        prompt="a boat", num_first_chunk_conditional_frames=5, output_type="latent", **request,
        progress=calls.append,
    )  # fmt: skip
    made = output.latents["vision"]
    assert made.shape[2] == 4 * 2
    for chunk in range(1, 4):
        noise = initial_noise({"vision": (1, 48, 2, 4, 6)}, seed=1 + chunk, rule="numpy")["vision"]
        assert np.abs(made[:, :, 2 * chunk + 1] - noise[:, :, 1].numpy()).max() > 1e-2
    assert calls[-1].steps == SMALL["num_inference_steps"] * 4


def test_controls_and_input_beside_the_video(engine: Cosmos3) -> None:
    """From left to right: input, controls, result; as long as the result, which stays the same."""
    source, control = clip(8), clip(7, 1)
    request = {"seg": control, "video": source, "num_video_frames_per_chunk": 5, **SMALL}
    plain = engine.generate(prompt="a boat", **request).video
    shown = {"show_control_condition": True, "show_input": True}
    wide = engine.generate(prompt="a boat", **request, **shown).video
    assert wide.shape == (7, 64, 3 * 96, 3)
    assert (wide[:, :, :96] == source[:7]).all()
    assert (wide[:, :, 96:192] == control).all()
    assert (wide[:, :, 192:] == plain).all()
