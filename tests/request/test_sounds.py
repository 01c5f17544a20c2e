"""Sound that a request brings along: followed by the video, or kept beside it."""

from __future__ import annotations

import shutil
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm_cosmos3 import media
from vllm_cosmos3.checkpoint.config import ModelConfig, read_config
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.request import prompts
from vllm_cosmos3.request.plan import Plan
from vllm_cosmos3.request.planner import make_plan
from vllm_cosmos3.request.request import from_fields

PICTURE = np.full((64, 96, 3), 128, np.uint8)
CLIP = np.full((9, 64, 96, 3), 128, np.uint8)
TONE = (0.5 * np.sin(np.arange(24_000) / 20)).astype(np.float32)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> ModelConfig:
    return read_config(tiny_checkpoint)


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> prompts.Tokenizer:
    return prompts.load_tokenizer(tiny_checkpoint)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "a.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(48_000)
        file.writeframes((TONE * 32767).astype("<i2").tobytes())
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "a.mp4"
    media.write_video(path, CLIP, fps=24, sound=np.stack([TONE, TONE]))
    return path


@pytest.fixture(scope="module")
def silent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("silent") / "a.mp4"
    media.write_video(path, CLIP, fps=24)
    return path


def planned(model: ModelConfig, tokenizer: prompts.Tokenizer, **fields: Any) -> Plan:
    small = {"prompt": "a boat", "size": "96x64", "num_frames": 9}
    return make_plan(from_fields(small | fields), model, tokenizer)


def test_a_sound_is_a_stream_that_is_known(
    model: ModelConfig, tokenizer: prompts.Tokenizer, sound: Path
) -> None:
    """As audio_image2video of the framework: a first frame and the whole sound are given."""
    plan = planned(model, tokenizer, image=PICTURE, sound_path=sound, generate_sound=True)
    vision, stream = plan.streams
    assert (vision.known, stream.name, stream.generated) == ((0,), "sound", False)
    assert stream.shape == (64, 10)  # of 9 frames at 24 a second: 18,000 samples, 1,920 for each
    assert plan.sound is stream.source
    assert plan.sound is not None
    assert plan.sound.shape == (2, 18_000)
    assert np.abs(plan.sound[0] - TONE[:18_000]).max() < 1e-3
    assert plan.effective["sound_path"] == str(sound)
    assert plan.pixel_bytes == PICTURE.nbytes + plan.sound.nbytes


def test_a_clip_may_be_followed_with_its_own_sound(
    model: ModelConfig, tokenizer: prompts.Tokenizer, clip: Path
) -> None:
    plan = planned(model, tokenizer, video=clip, sound_path=clip)
    assert [(stream.name, stream.known[:2]) for stream in plan.streams] == [
        ("vision", (0, 1)),
        ("sound", (0, 1)),
    ]


@pytest.mark.parametrize("fields", [{"edge": True, "num_frames": None}, {}])
def test_sound_of_a_clip_is_kept(
    model: ModelConfig, tokenizer: prompts.Tokenizer, clip: Path, fields: dict[str, Any]
) -> None:
    plan = planned(model, tokenizer, video=clip, keep_sound=True, **fields)
    assert {stream.name for stream in plan.streams} == {"vision"}
    assert plan.sound is not None
    assert plan.sound.shape == (2, 18_000)
    assert np.abs(plan.sound[0, 2000:16_000] - TONE[2000:16_000]).max() < 0.02


def test_sound_of_a_control_is_kept_if_there_is_no_video(
    model: ModelConfig, tokenizer: prompts.Tokenizer, clip: Path, silent: Path
) -> None:
    plan = planned(model, tokenizer, depth=clip, num_frames=None, keep_sound=True)
    assert plan.sound is not None
    with pytest.raises(InvalidRequest, match=r"depth is .* a file with a sound track"):
        planned(model, tokenizer, depth=silent, num_frames=None, keep_sound=True)


def test_without_an_encoder_sound_is_kept_but_not_followed(
    tiny_checkpoint: Path, tokenizer: prompts.Tokenizer, clip: Path, tmp_path: Path
) -> None:
    """Published files of the sound tokenizer hold the decoder alone, and need not say so."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "tiny"
    shutil.copytree(tiny_checkpoint, folder)
    weights = folder / "sound_tokenizer" / "diffusion_pytorch_model.safetensors"
    tensors = {k: v for k, v in load_file(weights).items() if k.startswith("decoder.")}
    save_file(tensors, weights)
    model = read_config(folder)
    assert model.sound is not None
    assert not model.sound.encoder_enabled
    assert planned(model, tokenizer, video=clip, keep_sound=True).sound is not None
    with pytest.raises(
        InvalidRequest, match=r"sound_path .* this checkpoint has no encoder"
    ) as caught:
        planned(model, tokenizer, sound_path=clip)
    assert caught.value.code == "unsupported_by_model"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sound_path": 5}, "sound_path is 5, must be a sound file"),
        ({"sound_path": "a.wav", "num_chunks": 2}, "num_chunks is 2, must be 1 with this sound_path"),
        ({"sound_path": "a.wav", "num_frames": 1}, "sound_path .* left out with this num_frames"),
        ({"sound_path": "a.wav", "edge": "a.mp4"}, "sound_path .* left out with this edge"),
        ({"sound_path": "a.wav", "action_mode": "policy"}, "left out with this action_mode"),
        ({"sound_path": "a.wav", "generate_sound": True, "sound_duration": 1}, "with this sound_dur"),
        ({"keep_sound": True}, "keep_sound is True, must be False, or given with a video"),
        ({"keep_sound": True, "video": CLIP, "generate_sound": True}, "has another sound"),
        ({"keep_sound": True, "video": CLIP, "sound_path": "a.wav"}, "has another sound"),
        ({"keep_sound": True, "video": "a", "condition_video_keep": "last"}, "not begin where"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        from_fields({"prompt": "a", **fields})


def test_frames_have_no_sound_to_keep(model: ModelConfig, tokenizer: prompts.Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="a video file: frames have no sound"):
        planned(model, tokenizer, video=CLIP, keep_sound=True)
