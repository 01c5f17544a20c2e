"""Transfers against Cosmos3OmniModularPipeline of diffusers: the same tokens and noise, float32.

Diffusers lets several controls see each other, which is ``control_attention="full"`` here; one test
puts the averaged attention of the models' own framework into the oracle. Clips have the size of the
output, since the oracle stretches them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Cosmos3OmniPipeline, UniPCMultistepScheduler
from diffusers.models.transformers import transformer_cosmos3
from diffusers.modular_pipelines.cosmos import Cosmos3OmniBlocks, Cosmos3OmniModularPipeline
from PIL import Image
from torch import Tensor

from vllm_cosmos3.engine import Cosmos3

pytestmark = pytest.mark.parity

BOUND = 1e-4
PROMPT, NEGATIVE = '{"caption": "A paper boat"}', "blurry, shaky"
HEIGHT, WIDTH, STEPS = 64, 96, 3
CASES: dict[str, dict[str, Any]] = {
    "one hint": {"hints": {"edge": 9}, "control_guidance": 1.5},
    "two hints": {"hints": {"depth": 9, "seg": 9}, "control_guidance": 2.0, "guidance_scale": 3.0},
    "controls alone guide": {"hints": {"wsm": 5}, "control_guidance": 3.0, "guidance_scale": 1.0},
    "intervals": {
        "hints": {"edge": 5},
        "control_guidance": 1.5,
        "control_guidance_interval": (950.0, 1000.0),
        "guidance_interval": (0.0, 990.0),
    },
    "no guidance": {"hints": {"blur": 7}, "guidance_scale": 1.0},
    "two chunks": {"hints": {"edge": 16}, "chunk": 9, "control_guidance": 1.5},
    "three chunks of two hints": {
        "hints": {"edge": 20, "depth": 11}, "chunk": 9, "overlap": 2, "guidance_scale": 2.0,
    },
    "five frames of overlap, started by the video": {
        "hints": {"blur": 14}, "chunk": 9, "overlap": 5, "start": 5, "control_guidance": 1.2,
    },
    "all of the first chunk is that of the video": {
        "hints": {"edge": 14}, "chunk": 5, "start": 5, "control_guidance": 1.5,
    },
}  # fmt: skip


def clip(frames: int, seed: int) -> np.ndarray:
    blocks = np.random.RandomState(seed).randint(0, 256, (frames, 4, 6, 3), dtype=np.uint8)
    return blocks.repeat(HEIGHT // 4, axis=1).repeat(WIDTH // 6, axis=2)


def pictures(frames: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(frame) for frame in frames]


@pytest.fixture(scope="module")
def oracle(tiny_checkpoint_fp32: Path) -> Cosmos3OmniModularPipeline:
    parts = Cosmos3OmniPipeline.from_pretrained(tiny_checkpoint_fp32, enable_safety_checker=False)
    pipeline = Cosmos3OmniBlocks().init_pipeline()
    pipeline.update_components(
        text_tokenizer=parts.text_tokenizer,
        transformer=parts.transformer,
        vae=parts.vae,
        scheduler=UniPCMultistepScheduler.from_config(
            parts.scheduler.config, flow_shift=10.0, use_karras_sigmas=False
        ),
    )
    pipeline.disable_safety_checker()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def theirs(oracle: Any, case: dict[str, Any], seed: int) -> Any:
    """The oracle's state: token ids, the last chunk's latents, and pixels in [0, 1]."""
    names = ("guidance_scale", "guidance_interval", "control_guidance", "control_guidance_interval")
    given = {name: case[name] for name in names if name in case}
    if "start" in case:
        given |= {"video": pictures(clip(case["start"], 9))}
    return oracle(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        control_videos={name: pictures(clip(frames, 2)) for name, frames in case["hints"].items()},
        height=HEIGHT,
        width=WIDTH,
        fps=24.0,
        num_inference_steps=STEPS,
        num_video_frames_per_chunk=case.get("chunk"),
        num_conditional_frames=case.get("overlap", 1),
        num_first_chunk_conditional_frames=case.get("start", 0),
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
        **{"guidance_scale": 3.0, **given},
    )


def mine(ours: Cosmos3, case: dict[str, Any], state: Any, **more: Any) -> Any:
    names = ("guidance_interval", "control_guidance_interval")
    hints = {
        name: {"control": clip(frames, 2), "control_weight": 1 + len(name)}
        for name, frames in case["hints"].items()
    }
    return ours.generate(
        **hints,
        prompt_token_ids=state.get("cond_input_ids"),
        negative_prompt_token_ids=state.get("uncond_input_ids"),
        guidance_scale=case.get("guidance_scale", 3.0),
        control_guidance=case.get("control_guidance", 1.0),
        num_video_frames_per_chunk=case.get("chunk"),
        num_conditional_frames=case.get("overlap"),
        num_first_chunk_conditional_frames=case.get("start"),
        video=clip(case["start"], 9) if "start" in case else None,
        size=f"{WIDTH}x{HEIGHT}",
        fps=24.0,
        num_inference_steps=STEPS,
        schedule="diffusers",
        noise="torch",
        **{"control_attention": "full", **more},
        **{name: case[name] for name in names if name in case},
    )


@pytest.mark.parametrize("name", CASES)
def test_transfer(oracle: Any, ours: Cosmos3, name: str) -> None:
    case = CASES[name]
    state = theirs(oracle, case, seed=4)
    latents, frames = state.get("latents").numpy(), state.get("videos")
    output = mine(ours, case, state, seed=4, output_type="latent")
    last = output.latents["vision"][:, :, -latents.shape[2] :]
    scale = np.abs(latents).max()
    assert np.abs(last - latents).max() <= BOUND * scale
    made = mine(ours, case, state, seed=4)
    assert made.video.shape == frames.shape
    # A value near the middle between two levels may be rounded to either.
    assert np.abs(made.video - frames * 255).max() <= 0.52
    other = mine(ours, case, state, seed=5, output_type="latent").latents["vision"]
    assert np.abs(other[:, :, -latents.shape[2] :] - latents).max() > 0.1 * scale


@pytest.mark.parametrize("name", ["two hints", "three chunks of two hints"])
def test_averaged_attention(
    oracle: Any, ours: Cosmos3, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle with the attention that the models were trained with put into its place.

    Target and one control attend to the text, to that control and to the target, for each control
    in turn; the target takes the mean by weight.
    """
    case = CASES[name]
    state = theirs(oracle, case, seed=4)  # for its token ids
    weights = torch.tensor([1.0 + len(hint) for hint in case["hints"]])
    attend = transformer_cosmos3.dispatch_attention_fn
    frames = case.get("chunk", 9)
    tokens = (1 + (frames - 1) // 4) * (HEIGHT // 32) * (WIDTH // 32)  # of one clip

    def averaged(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
        if q.shape[1] != 3 * tokens or q.shape[1] == k.shape[1]:
            return attend(q, k, v, **more)
        texts, out = k.shape[1] - q.shape[1], torch.zeros_like(q)
        target = torch.arange(2 * tokens, 3 * tokens)
        for control, weight in enumerate(weights / weights.sum()):
            own = torch.arange(control * tokens, (control + 1) * tokens)
            rows = torch.cat([own, target])
            keys = torch.cat([torch.arange(texts), texts + rows])
            found = attend(q[:, rows], k[:, keys], v[:, keys], **more)
            out[:, own] = found[:, :tokens]
            out[:, target] += weight * found[:, tokens:]
        return out

    monkeypatch.setattr(transformer_cosmos3, "dispatch_attention_fn", averaged)
    latents = theirs(oracle, case, seed=4).get("latents").numpy()
    scale = np.abs(latents).max()
    assert np.abs(latents - state.get("latents").numpy()).max() > 0.01 * scale
    request = {"seed": 4, "output_type": "latent", "control_attention": "averaged"}
    last = mine(ours, case, state, **request).latents["vision"][:, :, -latents.shape[2] :]
    assert np.abs(last - latents).max() <= BOUND * scale
