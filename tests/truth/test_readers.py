"""Other readers of the demo checkpoint: diffusers makes the same clips, transformers says what is so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import Cosmos3OmniPipeline, UniPCMultistepScheduler
from transformers import AutoProcessor, Cosmos3OmniForConditionalGeneration

from training.captions import canonical
from training.yardstick import Prompt
from vllm_cosmos3 import Cosmos3

pytestmark = pytest.mark.parity

DEMO = Path(__file__).parents[2] / "checkpoints" / "demo"


def test_diffusers_makes_the_same_clip(prompts: list[Prompt]) -> None:
    scene, caption = prompts[0].scene, prompts[0].caption
    common = {
        "prompt": caption.text, "negative_prompt": "{}", "height": 192, "width": 320,
        "num_frames": 17, "fps": float(scene.canvas.fps), "num_inference_steps": 4,
        "guidance_scale": 3.0,
    }  # fmt: skip
    pipeline = Cosmos3OmniPipeline.from_pretrained(
        DEMO, enable_safety_checker=False, use_native_flow_schedule=True
    )
    pipeline.scheduler = UniPCMultistepScheduler.from_config(
        pipeline.scheduler.config, flow_shift=10.0, use_karras_sigmas=False
    )
    pipeline.set_progress_bar_config(disable=True)
    noise = np.random.RandomState(5).standard_normal((1, 48, 5, 12, 20)).astype(np.float32)
    ids, negative_ids = pipeline.tokenize_prompt(
        caption.text, "{}", num_frames=17, height=192, width=320, fps=common["fps"],
        use_system_prompt=False,
    )  # fmt: skip
    theirs = pipeline(
        **common, latents=torch.from_numpy(noise.copy()), output_type="latent",
        use_system_prompt=False, enable_sound=False,
    ).video  # fmt: skip
    del common["prompt"], common["negative_prompt"]
    with Cosmos3(DEMO, device="cpu", dtype="float32") as model:
        mine = model.generate(
            prompt_token_ids=ids, negative_prompt_token_ids=negative_ids, **common,
            flow_shift=10.0, generate_sound=False, latents={"vision": noise}, output_type="latent",
        ).latents["vision"]  # fmt: skip
    assert np.abs(mine - theirs.numpy()).max() < 1e-3


@torch.no_grad()
def test_transformers_says_what_is_so(prompts: list[Prompt]) -> None:
    processor = AutoProcessor.from_pretrained(DEMO)
    model = Cosmos3OmniForConditionalGeneration.from_pretrained(DEMO, dtype=torch.float32).eval()
    right = 0
    for prompt_ in prompts:
        scene = prompt_.scene
        content = [{"type": "video"}, {"type": "text", "text": "What happens in the video?"}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        fps = float(scene.canvas.fps)
        batch = processor(
            text=[prompt], videos=[list(prompt_.frames(17))], do_sample_frames=True,
            video_metadata=[{"total_num_frames": 17, "fps": fps, "duration": 17 / fps}],
            return_tensors="pt",
        )  # fmt: skip
        out = model.generate(**batch, max_new_tokens=40, do_sample=False)
        said = processor.decode(out[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        right += said.strip() == canonical(scene)
    assert right >= 5
