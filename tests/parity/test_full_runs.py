"""Whole requests against Cosmos3OmniPipeline of diffusers: the same tokens and noise, float32.

The oracle runs the native flow schedule. Both sides end with latents that agree to 1e-4.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Cosmos3OmniPipeline
from oracles import guided
from PIL import Image

from vllm_cosmos3.checkpoint.config import read_config
from vllm_cosmos3.engine import Cosmos3
from vllm_cosmos3.request.planner import make_plan
from vllm_cosmos3.request.prompts import load_tokenizer
from vllm_cosmos3.request.request import GenerateRequest

pytestmark = pytest.mark.parity

BOUND = 1e-4
PROMPT, NEGATIVE = "A paper boat floats down a stream", "blurry, shaky"


@dataclass(frozen=True, kw_only=True)
class Case:
    frames: int = 9
    height: int = 64
    width: int = 96
    fps: float = 24.0
    steps: int = 4
    guidance: float = 6.0
    sound: bool = False
    source: str = ""  # "image", "video", or nothing

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return (1, 48, 1 + (self.frames - 1) // 4, self.height // 16, self.width // 16)


CASES = {
    "one step": Case(steps=1),
    "two steps": Case(steps=2),
    "four steps": Case(),
    "thirty-five steps": Case(steps=35),
    "no guidance": Case(guidance=1.0),
    "image": Case(frames=1, steps=3),
    "sound": Case(sound=True),
    "odd latent size": Case(height=80, width=112, steps=3),
    "fractional fps": Case(fps=23.976, sound=True, steps=3),
    "image-to-video": Case(source="image"),
    "image-to-video with sound": Case(source="image", sound=True, height=80, fps=12.5),
    "video-to-video": Case(source="video", frames=13),
}


@pytest.fixture(scope="module")
def oracle(tiny_checkpoint_fp32: Path) -> Cosmos3OmniPipeline:
    return guided(tiny_checkpoint_fp32)


def source(case: Case, seed: int) -> dict[str, Any]:
    """The picture or clip of a case: random blocks. A picture has another size than the video.

    The oracle stretches clips to the size of the output, so a clip has that size already.
    """
    rng = np.random.RandomState(seed)
    if case.source == "image":
        small = rng.randint(0, 256, (5, 9, 3), dtype=np.uint8)
        return {"image": Image.fromarray(small).resize((150, 101), Image.Resampling.BICUBIC)}
    if case.source == "video":
        small = rng.randint(0, 256, (7, 4, 6, 3), dtype=np.uint8)
        size = (case.width, case.height)
        return {"video": [Image.fromarray(frame).resize(size) for frame in small]}
    return {}


def reference(
    oracle: Cosmos3OmniPipeline, case: Case, seed: int, given: dict[str, Any], **more: Any
) -> dict[str, np.ndarray]:
    """Final latents of the oracle. Those of the sound are caught where they are decoded."""
    caught = []
    decode = oracle.decode_sound
    oracle.decode_sound = lambda latent: (caught.append(latent), decode(latent))[1]
    try:
        out = oracle(
            prompt=PROMPT,
            negative_prompt=NEGATIVE,
            num_frames=case.frames,
            height=case.height,
            width=case.width,
            fps=case.fps,
            num_inference_steps=case.steps,
            guidance_scale=case.guidance,
            enable_sound=case.sound,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
            use_system_prompt=False,
            **given,
            **more,
        )
    finally:
        del oracle.decode_sound
    latents = {"vision": out.video.numpy()}
    return latents | ({"sound": caught[0].numpy()} if case.sound else {})


def fields(oracle: Cosmos3OmniPipeline, case: Case) -> dict[str, Any]:
    """The same request to us, with the oracle's token ids."""
    ids, negative_ids = oracle.tokenize_prompt(
        PROMPT,
        NEGATIVE,
        num_frames=case.frames,
        height=case.height,
        width=case.width,
        fps=case.fps,
        use_system_prompt=False,
    )
    return {
        "prompt_token_ids": ids,
        "negative_prompt_token_ids": negative_ids,
        "num_frames": case.frames,
        "height": case.height,
        "width": case.width,
        "fps": case.fps,
        "num_inference_steps": case.steps,
        "guidance_scale": case.guidance,
        "flow_shift": 10.0,
        "generate_sound": case.sound,
        "output_type": "latent",
    }


def furthest(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    assert a.keys() == b.keys()
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)


@pytest.mark.parametrize("name", CASES)
def test_final_latents(oracle: Cosmos3OmniPipeline, ours: Cosmos3, name: str) -> None:
    case, seed = CASES[name], 11
    request, given = fields(oracle, case), source(case, 1)
    mine = ours.generate(**request, **given, seed=seed, noise="torch").latents
    assert furthest(mine, reference(oracle, case, seed, given)) <= BOUND
    if given:
        other = ours.generate(**request, **source(case, 2), seed=seed, noise="torch").latents
        assert furthest(mine, other) > 0.1


@pytest.mark.parametrize("name", ["four steps", "image-to-video"])
def test_given_noise(oracle: Cosmos3OmniPipeline, ours: Cosmos3, name: str) -> None:
    """``latents`` is noise alone here; the oracle wants it mixed with the encoded picture."""
    case, given = CASES[name], source(CASES[name], 1)
    noise = np.random.RandomState(5).standard_normal(case.latent_shape).astype(np.float32)
    mine = ours.generate(**fields(oracle, case), **given, latents={"vision": noise}).latents
    start = torch.from_numpy(noise.copy())
    if given:
        encoded, *_ = oracle.prepare_latents(
            **given,
            num_frames=case.frames,
            height=case.height,
            width=case.width,
            device="cpu",
            dtype=torch.float32,
        )
        start[:, :, 0] = encoded[:, :, 0]
    assert furthest(mine, reference(oracle, case, 0, given, latents=start)) <= BOUND


def test_last_frames_of_a_longer_clip(oracle: Cosmos3OmniPipeline, ours: Cosmos3) -> None:
    case, seed = CASES["video-to-video"], 3
    given = source(case, 1) | {
        "condition_video_keep": "last",
        "condition_frame_indexes_vision": [1],
    }
    mine = ours.generate(**fields(oracle, case), **given, seed=seed, noise="torch").latents
    assert furthest(mine, reference(oracle, case, seed, given)) <= BOUND


def test_pixels_and_sound(oracle: Cosmos3OmniPipeline, ours: Cosmos3) -> None:
    case, seed = CASES["sound"], 2
    request = fields(oracle, case) | {"output_type": "pixels"}
    mine = ours.generate(**request, seed=seed, noise="torch")
    theirs = oracle(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        num_frames=case.frames,
        height=case.height,
        width=case.width,
        num_inference_steps=case.steps,
        enable_sound=True,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
        use_system_prompt=False,
    )
    # A value near the middle between two levels may be rounded to either.
    assert np.abs(mine.video - theirs.video * 255).max() <= 0.51
    assert np.abs(mine.sound - theirs.sound.numpy()).max() <= BOUND


@pytest.mark.parametrize("system", [0, 1])
@pytest.mark.parametrize("frames", [1, 9])
def test_token_ids(
    oracle: Cosmos3OmniPipeline, tiny_checkpoint_fp32: Path, frames: int, system: int
) -> None:
    """Plain prompts as diffusers builds them: inverse metadata in the negative prompt."""
    theirs = oracle.tokenize_prompt(
        PROMPT + ".",
        NEGATIVE,
        num_frames=frames,
        height=64,
        width=96,
        fps=12.5,
        use_system_prompt=bool(system),
    )
    request = GenerateRequest(
        prompt=PROMPT + ".",
        negative_prompt=NEGATIVE,
        num_frames=frames,
        size="96x64",
        fps=12.5,
        negative_metadata_mode="inverse",
        use_system_prompt=bool(system),
    )
    tokenizer = load_tokenizer(tiny_checkpoint_fp32)
    plan = make_plan(request, read_config(tiny_checkpoint_fp32), tokenizer)
    assert [list(ids) for ids in plan.token_ids] == list(theirs)
