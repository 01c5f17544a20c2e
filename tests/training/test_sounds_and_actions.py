"""Tones on contact are heard where they are; a gripper's path survives its action rows."""

from __future__ import annotations

import numpy as np
import pytest

from training.actions import (
    CHUNK,
    DOMAIN,
    EMBODIMENT,
    FPS,
    VIEW,
    WIDTH,
    carried_out,
    closed_loop,
    lifted,
    path_of,
    picking,
    rows_of,
)
from training.observing import observe
from training.rendering import true_clip
from training.scenes import ACTED, GROWN, MATERIALS, Canvas, Scene, draw_scene, window
from training.sounds import PITCHES, RATE, on_time, sound_of, tones_in
from vllm_cosmos3.request.embodiments import VIEWS, find_embodiment


def scenes(kind: str, count: int = 8) -> list[Scene]:
    drawn = (draw_scene(seed, None, GROWN, MATERIALS) for seed in range(400))
    return [scene for scene in drawn if scene.kind == kind][:count]


@pytest.mark.parametrize("kind", ["push", "lift", "drop", "bounce", "stack"])
def test_contacts_are_heard(kind: str) -> None:
    for scene in scenes(kind):
        (frame, material), (tone,) = scene.contacts[0], tones_in(sound_of(scene))
        assert tone.material == material
        assert abs(tone.seconds - frame / scene.canvas.fps) < 0.04


@pytest.mark.parametrize("kind", ["push", "lift", "drop", "bounce", "stack", "single"])
def test_tones_are_on_time_with_what_is_seen(kind: str) -> None:
    for scene in scenes(kind, 3):
        seen, sound = observe(true_clip(scene)), sound_of(scene)
        assert seen.gripper is None or scene.gripper is not None  # spots are no grippers
        assert on_time(scene, seen, sound)
        late = np.roll(sound, 5 * RATE // scene.canvas.fps, axis=1)
        assert on_time(scene, seen, late) == (not scene.contacts)


def test_no_contact_is_silence() -> None:
    for scene in scenes("single"):
        sound = sound_of(scene)
        assert not sound.any()
        assert tones_in(sound) == []


def test_noise_is_no_tone() -> None:
    noise = np.random.RandomState(0).standard_normal((2, RATE)).astype(np.float32) * 0.05
    assert tones_in(noise) == []
    wave = np.sin(2 * np.pi * 700 * np.arange(RATE) / RATE).astype(np.float32) * 0.3
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
        assert np.abs(rows).max() < 4


@pytest.mark.parametrize("kind", ["pick", "lift"])
def test_rows_move_what_is_gripped_and_nothing_else(kind: str) -> None:
    drawn = (draw_scene(seed, Canvas(frames=33, fps=FPS), ACTED) for seed in range(60))
    for scene in [scene for scene in drawn if scene.kind == kind][:8]:
        done = carried_out(window(scene, 0, 1), rows_of(scene.gripper))
        for mine, true in zip(done.things, scene.things, strict=True):
            assert np.abs(mine.path - true.path).max() < 6
        assert lifted(done)
        still = np.zeros_like(rows_of(scene.gripper))
        still[:, 9] = 3
        assert not lifted(carried_out(window(scene, 0, 1), still))


def test_a_closed_loop_is_one_scene() -> None:
    """A policy that knows the way sees where the world is, and lifts the thing in the second chunk."""
    scene = picking(seed=7, chunks=2)
    rows = rows_of(scene.gripper)
    pictures: list[np.ndarray] = []

    def policy(picture: np.ndarray) -> np.ndarray:
        pictures.append(picture)
        return rows[:CHUNK] if len(pictures) == 1 else rows[CHUNK:]

    done = closed_loop(scene, policy, 2)
    assert lifted(done)
    assert np.abs(done.gripper.path - scene.gripper.path).max() < 1e-3
    clip = true_clip(done).numpy()
    assert len(clip) == 2 * CHUNK + 1
    assert all(np.array_equal(a, b) for a, b in zip(pictures, clip[[0, CHUNK]], strict=True))
    assert np.abs(clip.astype(int) - true_clip(scene).numpy()).mean() < 1


def test_the_embodiment_is_the_packages() -> None:
    found = find_embodiment(EMBODIMENT, None)
    assert WIDTH in found.widths
    assert (found.domain_id, found.fps) == (DOMAIN, FPS)
    assert VIEWS[found.view_point] == VIEW
