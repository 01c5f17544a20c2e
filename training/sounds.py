"""The sound of scenes: a tone on each contact, its pitch by material; and a detector of such tones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.observing import Seen
from training.scenes import Scene

RATE = 48_000  # samples per second
# In Hz: multiples of 200, so that a latent of 1/25 second, and what the decoder makes of it by its first
# stride of eight, hold whole periods; and no multiples of each other, as what distorts adds those.
PITCHES = {"rubber": 400.0, "wood": 1000.0, "metal": 1400.0}
_LENGTH, _FADE = 0.25, 0.06  # seconds: of a tone, and until it has fallen to a third
_WINDOW, _HOP = 2048, 480
_PRESENT = 0.02  # amplitude of a tone from which on it is heard


@dataclass(frozen=True, slots=True)
class Tone:
    """A tone that was heard: when it began, and of which material it is."""

    seconds: float
    material: str


def sound_of(scene: Scene) -> NDArray[np.float32]:
    """Samples [2, N] in [-1, 1], as long as the clip; louder on the side where the thing is.

    A tone's phase is that of a clock that starts with the clip: latents need not carry it.
    """
    canvas = scene.canvas
    samples = np.zeros((2, round(canvas.frames / canvas.fps * RATE)), np.float32)
    for frame, material in scene.contacts:
        first = round(frame / canvas.fps * RATE)
        count = max(0, min(round(_LENGTH * RATE), samples.shape[1] - first))
        time = np.arange(count) / RATE
        attack = np.clip(time / 0.003, 0, 1)
        phase = 2 * np.pi * PITCHES[material] * (first + np.arange(count)) / RATE
        wave = np.sin(phase) * np.exp(-time / _FADE) * attack
        x = scene.things[-1].path[min(round(frame), canvas.frames - 1), 0] / canvas.width
        for side, share in enumerate((1 - x, x)):
            samples[side, first : first + count] += (0.3 + 0.4 * share) * wave
    return samples


def tones_in(sound: NDArray[np.float32], rate: int = RATE) -> list[Tone]:
    """Tones in samples [channels, N], in order of time, by their strength at each pitch."""
    mono = np.pad(sound.mean(0), (_WINDOW // 2, _WINDOW))
    starts = np.arange(0, sound.shape[1], _HOP)
    frames = np.stack([mono[start : start + _WINDOW] for start in starts]) * np.hanning(_WINDOW)
    time = np.arange(_WINDOW) / rate
    heard = []
    for material, pitch in PITCHES.items():
        wave = np.exp(-2j * np.pi * pitch * time)
        strength = np.abs(frames @ wave) / (_WINDOW / 4)
        above = np.concatenate([[False], strength > _PRESENT])
        for index in np.flatnonzero(above[1:] & ~above[:-1]):
            heard.append(Tone(_onset(strength, index, rate), material))
    return sorted(heard, key=lambda tone: tone.seconds)


def on_time(scene: Scene, seen: Seen, sound: NDArray[np.float32], rate: int = RATE) -> bool:
    """Whether one tone of the right material is heard within two frames of the contact that is seen.

    Of a scene without contact, whether there is silence.
    """
    heard = tones_in(sound, rate)
    if not scene.contacts:
        return not heard
    frame = contact_frame(scene.kind, seen)
    if frame is None or [tone.material for tone in heard] != [scene.contacts[0][1]]:
        return False
    return abs(heard[0].seconds * scene.canvas.fps - frame) <= 2


def contact_frame(kind: str, seen: Seen) -> float | None:
    """The frame of a contact as far as pixels show it: None if they do not."""
    if kind == "push":
        return seen.push()
    if kind == "stack":
        return seen.contact()
    if kind not in ("lift", "drop", "bounce") or not seen.things:
        return None
    height = seen.things[0].centres[:, 1]
    if np.isnan(height).any():
        return None
    if kind == "lift":  # the last frame before it rises
        rising = np.flatnonzero(height < height[0] - 2)
        return float(rising[0] - 1) if len(rising) else None
    return float(np.argmax(height >= height.max() - 2))


def _onset(strength: NDArray[np.float64], index: int, rate: int) -> float:
    """When a tone began: where its strength has risen to half of what it comes to."""
    until = index + round(0.1 * rate / _HOP)
    rising = strength[index:until]
    half = index + int(np.argmax(rising >= rising.max() / 2))
    return half * _HOP / rate
