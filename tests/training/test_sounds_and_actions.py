"""Tones on contact are heard where they are; a gripper's path survives its action rows."""

from __future__ import annotations

import numpy as np
import pytest

from training.actions import EMBODIMENT, WIDTH, path_of, rows_of
from training.scenes import GROWN, MATERIALS, Scene, draw_scene
from training.sounds import PITCHES, RATE, sound_of, tones_in
from vllm_cosmos3.request.embodiments import find_embodiment


def scenes(kind: str, count: int = 8) -> list[Scene]:
    drawn = (draw_scene(seed, None, GROWN, MATERIALS) for seed in range(400))
    return [scene for scene in drawn if scene.kind == kind][:count]


@pytest.mark.parametrize("kind", ["push", "lift", "drop", "bounce", "stack"])
def test_contacts_are_heard(kind: str) -> None:
    for scene in scenes(kind):
        (frame, material), (tone,) = scene.contacts[0], tones_in(sound_of(scene))
        assert tone.material == material
        assert abs(tone.seconds - frame / scene.canvas.fps) < 0.04


def test_no_contact_is_silence() -> None:
    for scene in scenes("single"):
        sound = sound_of(scene)
        assert not sound.any()
        assert tones_in(sound) == []


def test_noise_is_no_tone() -> None:
    noise = np.random.RandomState(0).standard_normal((2, RATE)).astype(np.float32) * 0.05
    assert tones_in(noise) == []
    wave = np.sin(2 * np.pi * 500 * np.arange(RATE) / RATE).astype(np.float32) * 0.3
    assert tones_in(np.stack([wave, wave])) == []
    assert set(PITCHES) == set(MATERIALS)


@pytest.mark.parametrize("kind", ["lift", "drop", "stack"])
def test_paths_survive_their_rows(kind: str) -> None:
    for scene in scenes(kind):
        path = scene.gripper.path
        rows = rows_of(scene.gripper)
        assert rows.shape == (scene.canvas.frames - 1, WIDTH)
        back = path_of(rows, tuple(path[0, :2]))
        assert np.abs(back[:, :2] - path[:, :2]).max() < 0.01
        assert np.abs(back[1:, 2] - path[1:, 2]).max() < 0.01
        assert np.abs(rows).max() < 2


def test_the_embodiment_takes_such_rows() -> None:
    assert WIDTH in find_embodiment(EMBODIMENT, None).widths
