"""The demo checkpoint's sound: a tone when things touch, by their material, and silence where nothing does.

Bounds are those that the seeds 0, 1 and 2 all pass, as in `test_clips`.
"""

from __future__ import annotations

import numpy as np
from judged import FEW_STEPS, FIRST

from training.scenes import MATERIALS
from training.sounds import tones_in
from training.yardstick import Prompt, held_out_prompts
from vllm_cosmos3 import Cosmos3

RATE, HOP = 48_000, 1_920  # samples per second, and per latent


def heard(model: Cosmos3, prompt: Prompt) -> tuple[np.ndarray, np.ndarray]:
    """Clip and sound of a prompt."""
    fields = FEW_STEPS | {"seed": 0, "generate_sound": True}
    out = model.generate(**prompt.fields | fields)
    assert out.sound is not None
    assert 0 <= out.sound.shape[1] - 17 / prompt.scene.canvas.fps * RATE <= HOP
    return out.video, out.sound


def test_a_tone_on_contact(demo: Cosmos3) -> None:
    """Within two frames of the contact that the clip shows, at the pitch of the material: two prompts of each."""
    prompts = held_out_prompts(60, FIRST, materials=MATERIALS)
    sounding = [p for p in prompts if p.scene.contacts]
    six = [p for m in MATERIALS for p in [q for q in sounding if q.scene.contacts[0][1] == m][:2]]
    assert len(six) == 6
    on_time = [prompt.confirmed(*heard(demo, prompt))["sound"] for prompt in six]
    assert sum(on_time) >= 5


def test_silence_where_nothing_touches(demo: Cosmos3) -> None:
    prompts = [p for p in held_out_prompts(20, FIRST) if not p.scene.contacts][:2]
    assert [tones_in(heard(demo, prompt)[1]) for prompt in prompts] == [[], []]
