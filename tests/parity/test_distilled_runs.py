"""Distilled checkpoints against Cosmos3DistilledModularPipeline of diffusers: four steps, float32.

Text-to-image and image-to-video, with the same tokens and the noise of the same torch generator.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.modular_pipelines.cosmos import Cosmos3DistilledModularPipeline
from PIL import Image

from vllm_cosmos3.checkpoint.synthetic import write_checkpoint
from vllm_cosmos3.engine import Cosmos3

pytestmark = pytest.mark.parity

BOUND = 1e-4
PROMPT = "A paper boat floats down a stream"
IMAGE = Image.fromarray(np.random.RandomState(1).randint(0, 256, (50, 150, 3), dtype=np.uint8))
CASES: dict[str, dict[str, Any]] = {
    "distilled-t2i": {"num_frames": 1, "height": 96, "width": 80},
    "distilled-i2v": {"num_frames": 9, "height": 64, "width": 96, "fps": 16.0, "image": IMAGE},
}


def reference(folder: Path, fields: dict[str, Any], seed: int) -> tuple[list[int], torch.Tensor]:
    """Token ids of the prompt and final latents."""
    oracle = Cosmos3DistilledModularPipeline.from_pretrained(folder)
    oracle.load_components(dtype=torch.float32)
    oracle.disable_safety_checker()
    oracle.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    state = oracle(prompt=PROMPT, generator=generator, use_system_prompt=False, **fields)
    return state.get("cond_input_ids"), state.get("latents")


@pytest.mark.parametrize("kind", CASES)
def test_final_latents(tmp_path: Path, kind: str) -> None:
    folder, fields = tmp_path / kind, CASES[kind]
    write_checkpoint(folder, kind=kind, dtype="float32")
    ids, latents = reference(folder, fields, seed=5)
    with Cosmos3(folder, dtype="float32", device="cpu") as model:
        mine, other = (
            model.generate(
                prompt_token_ids=ids, seed=seed, noise="torch", output_type="latent", **fields
            )
            for seed in (5, 6)
        )
    assert mine.effective["num_inference_steps"] == 4
    assert mine.effective["guidance_scale"] == 1
    scale = float(latents.abs().max())
    assert np.abs(mine.latents["vision"] - latents.numpy()).max() <= BOUND * scale
    assert np.abs(other.latents["vision"] - latents.numpy()).max() > 0.1 * scale
