"""Rollouts: several chunks in one video, each from the last frame of the one before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from media_files import clip, picture

from vllm_cosmos3.engine import Cosmos3
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.request.request import GenerateRequest

FIELDS: dict[str, Any] = {
    "prompt": "a boat", "size": "96x64", "num_frames": 9, "num_inference_steps": 2, "seed": 5,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_checkpoint_fp32: Path) -> Iterator[Cosmos3]:
    with Cosmos3(tiny_checkpoint_fp32, dtype="float32") as model:
        yield model


def video(model: Cosmos3, **fields: Any) -> np.ndarray:
    made = model.generate(**FIELDS | fields).video
    assert made is not None
    return made


def inputs(mode: str, tmp_path: Path) -> dict[str, Any]:
    if mode == "video2video":
        return {"video": clip(tmp_path / "clip.mp4", frames=9)}
    return {"image": picture(96, 64)} if mode == "image2video" else {}


@pytest.mark.parametrize("mode", ["text2video", "image2video", "video2video"])
def test_each_chunk_goes_on_where_the_last_one_ended(
    mode: str, model: Cosmos3, tmp_path: Path
) -> None:
    given = inputs(mode, tmp_path)
    whole = video(model, num_chunks=3, **given)
    assert whole.shape == (9 + 8 + 8, 64, 96, 3)
    first = video(model, **given)
    assert np.array_equal(whole[:9], first)
    # By hand: the frame is rounded to bytes in between, which the rollout leaves out.
    second = video(model, image=first[-1], seed=6)
    assert np.abs(whole[9:17].astype(int) - second[1:]).mean() < 1.5
    assert np.abs(whole[9:17].astype(int) - first[1:]).mean() > 5


def test_a_path_is_driven_in_chunks(model: Cosmos3) -> None:
    """Each chunk takes its own actions, and its first frame is laid on the canvas again."""
    rows = np.random.RandomState(0).standard_normal((8, 9)) * 50  # random weights hardly listen
    common = {"num_frames": None, "action_mode": "forward_dynamics", "domain_name": "av"}
    start = np.array(picture(80, 48))
    whole = video(model, **common, image=start, action=rows, num_chunks=2)
    assert whole.shape == (9, 48, 80, 3)
    first = video(model, **common, image=start, action=rows[:4])
    assert np.array_equal(whole[:5], first)
    second = video(model, **common, image=first[-1], action=rows[4:], seed=6)
    other = video(model, **common, image=first[-1], action=rows[:4], seed=6)
    near, far = (np.abs(whole[5:].astype(int) - x[1:]).mean() for x in (second, other))
    assert near < 0.5
    assert far > 4 * near


def test_the_history_of_a_later_chunk_is_what_was_carried_out(model: Cosmos3) -> None:
    rows = np.arange(8)[:, None].repeat(9, 1)
    fields = {"action_mode": "forward_dynamics", "domain_name": "av", "image": picture(96, 64)}
    history = np.full((2, 9), -1)
    plan = model.plan("go", **fields, action=rows, action_history=history, num_chunks=2)
    first, second = (chunk[1].source[:, 0].tolist() for chunk in plan.chunks)
    assert (first, second) == ([-1, -1, 0, 1, 2, 3], [2, 3, 4, 5, 6, 7])
    assert plan.effective["num_frames"] == 9
    assert plan.effective["action_chunk_size"] == 4


def test_the_record_tells_of_the_whole(model: Cosmos3) -> None:
    seen = []
    output = model.generate(**FIELDS, num_chunks=2, fps=12, progress=seen.append)
    wanted = {"num_frames": 17, "num_chunks": 2, "num_video_frames_per_chunk": 9}
    assert wanted.items() <= output.effective.items()
    assert output.effective["seconds"] == pytest.approx(17 / 12)
    assert seen[-1].steps == 4
    steps = [at.step for at in seen if at.phase == "denoise"]
    assert steps == sorted(steps)
    assert steps[-1] == 4


def test_the_prompt_tells_of_a_chunk(model: Cosmos3) -> None:
    alone, several = (model.plan(**FIELDS, num_chunks=count) for count in (1, 4))
    assert alone.token_ids == several.token_ids
    assert [len(plan.chunks) for plan in (alone, several)] == [1, 4]


def test_several_results_and_latents(model: Cosmos3) -> None:
    two = model.generate(**FIELDS, num_chunks=2, n=2)
    for sample, seed in zip(two.samples, (5, 6), strict=True):
        assert np.array_equal(sample.video, video(model, num_chunks=2, seed=seed))  # type: ignore[arg-type]
    latents = model.generate(**FIELDS, num_chunks=2, output_type="latent").latents
    assert latents is not None
    assert latents["vision"].shape == (1, 48, 6, 4, 6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_frames": 1}, "must be 1 with this num_frames: a picture has no last frame"),
        ({"generate_sound": True}, "must be 1 with this generate_sound"),
        ({"action_mode": "policy", "image": picture()}, "must be 1 with this action_mode"),
        ({"action_state": [1.0], "image": picture()}, "must be 1 with this action_state"),
        ({"edge": True, "video": "a.mp4"}, "must be 1 with this edge: a transfer makes chunks"),
        ({"num_chunks": 0}, "num_chunks is 0, must be an integer from 1 to 100 chunks"),
    ],
)
def test_what_has_no_rollout(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        GenerateRequest(**{"prompt": "a", "num_chunks": 2} | fields)
    assert message in str(error.value)


def test_noise_of_ones_own_is_for_one_chunk(model: Cosmos3) -> None:
    noise = {"vision": np.zeros((1, 48, 3, 4, 6), np.float32)}
    with pytest.raises(InvalidRequest, match="each chunk draws its own noise"):
        model.plan(**FIELDS, num_chunks=2, latents=noise)
