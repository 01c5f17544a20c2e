"""Further modes of the towers, as kinds of steps beside video after text.

``--modes pictures sizes actions policy transfer sound`` of `train_towers` adds them. Each draws its scenes before
CUDA starts, encodes them with the trained autoencoder, and has losses whose turn comes every so many steps.
"""

from __future__ import annotations

import random
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from training.actions import CHUNK, DOMAIN, FPS, VIEW, WIDTH, Rows, rows_of
from training.captions import draw_caption, instruction
from training.flow import Flow, Texts, drawn_levels, flow_loss, mixed, weights_of, with_dropped
from training.optimisation import Kind
from training.parts import Parts
from training.pools import Codec, cells, draw, drawing, make_pool, scenes_at
from training.prompts import NEGATIVES, encoded, framed, framed_action, framed_transfer
from training.rendering import Packed, occupied, pack, render, segmented, to_bytes
from training.scenes import ACTED, BASIC, GROWN, MATERIALS, RATES, Canvas, draw_scene, window
from training.sounds import sound_of
from training.streams import Actions, Sound, Video
from training.train_sound import HOP, SOUND_WIDTHS, latents_of

FORWARD, INVERSE, POLICY = range(3)  # rows to clip, clip to rows, both
LONG = 2 * CHUNK + 1  # frames of the scenes whose windows teach actions
EDGES = (100, 200)  # of Canny's hysteresis: the package's preset of medium strength
CANVASES = {
    "pictures": (Canvas(320, 192, 1), Canvas(256, 256, 1), Canvas(192, 320, 1)),
    "sizes": (Canvas(256, 256, 17), Canvas(192, 320, 17), Canvas(320, 192, 33)),
}
QUIET = {"single": 15, "two": 5}  # of the scenes with sound: most of them have a contact
_CHUNK = 512


@dataclass(frozen=True, slots=True)
class Mode:
    """How a mode is taught: ``draw(a)`` before CUDA, ``losses(parts, drawn, a)`` after, one each ``every`` steps."""

    draw: Callable[[Namespace], Any]
    losses: Callable[[Parts, Any, Namespace], list[Callable[[], Tensor]]]
    every: int


def draw_modes(a: Namespace) -> dict[str, Any]:
    """What the chosen modes need, drawn in processes of their own."""
    return {name: MODES[name].draw(a) for name in a.modes}


def kinds_of(parts: Parts, drawn: dict[str, Any], a: Namespace) -> list[Kind]:
    """Kinds of steps of the chosen modes. Those of one mode take turns by different distances."""
    found = []
    for name in a.modes:
        losses = MODES[name].losses(parts, drawn[name], a)
        found += [Kind(loss, MODES[name].every + 2 * i) for i, loss in enumerate(losses)]
    return found


# Pictures and other sizes.


def _draw_sized(name: str, a: Namespace) -> list[Any]:
    count = max(4, a.pool // 8)
    return [draw(a.first, count, c, grown=a.grown, workers=a.workers) for c in CANVASES[name]]


def _sized_losses(
    name: str, shift: float, parts: Parts, drawn: list[Any], a: Namespace
) -> list[Callable[[], Tensor]]:
    pools = [
        make_pool(one, canvas, parts.codec, parts.tokenizer)
        for one, canvas in zip(drawn, CANVASES[name], strict=True)
    ]
    flow = Flow(shift=shift, things=a.things)
    usual = parts.pool.latents[0].numel()
    batches = [max(2, a.batch * usual // pool.latents[0].numel()) for pool in pools]
    return [
        partial(flow_loss, parts.model, pool, min(batch, 4 * a.batch), flow, structured=False)
        for pool, batch in zip(pools, batches, strict=True)
    ]


# Actions.


@dataclass(frozen=True, slots=True, eq=False)
class ActionPool:
    """Clips with the rows of their gripper: latents [N, T, h, w, C], rows [N, CHUNK, width]."""

    latents: Tensor
    rows: Tensor
    ids: Tensor
    lengths: Tensor


def _draw_actions(a: Namespace) -> list[tuple[list[NDArray[Any]], Rows, list[str]]]:
    count = max(8, a.pool // (1 if a.changed else 2))
    starts = range(a.first, a.first + count, _CHUNK)
    sizes = [min(_CHUNK, a.first + count - start) for start in starts]
    canvas = Canvas(a.size[0], a.size[1], LONG, FPS)
    job = partial(_acted_chunk, canvas=canvas, frames=min(a.size[2], CHUNK + 1))
    if a.workers == 1:
        return list(map(job, starts, sizes))
    with drawing(a.workers) as pool:
        return list(pool.map(job, starts, sizes))


def _acted_chunk(
    first: int, count: int, *, canvas: Canvas, frames: int
) -> tuple[list[NDArray[Any]], Rows, list[str]]:
    """Windows of scenes: a gripper is seen on its way as well, as after a first chunk."""
    scenes = []
    for seed in range(first, first + count):
        start = random.Random(seed ^ 0xAC7).randrange(canvas.frames - frames + 1)
        scenes.append(window(draw_scene(seed, canvas, ACTED), start, frames))
    packed = pack(scenes)
    rows = np.stack([rows_of(scene.gripper) for scene in scenes if scene.gripper is not None])
    texts = [framed_action(f"{instruction(s)}.".capitalize(), VIEW, s.canvas) for s in scenes]
    return [packed.things.numpy(), packed.gripper.numpy(), packed.tone.numpy()], rows, texts


def _action_losses(
    tasks: tuple[int, ...], parts: Parts, drawn: list[Any], a: Namespace
) -> list[Callable[[], Tensor]]:
    codec, width = parts.codec, parts.model.shape.action
    packed = Packed(*(torch.from_numpy(np.concatenate([d[0][i] for d in drawn])) for i in range(3)))
    canvas = parts.pool.canvas
    latents = torch.cat(list(_encoded_parts(codec, packed, canvas)))
    rows = torch.from_numpy(np.concatenate([d[1] for d in drawn])).to(codec.device)
    ids, lengths = encoded(parts.tokenizer, [text for d in drawn for text in d[2]])
    pool = ActionPool(
        latents, F.pad(rows, (0, width - WIDTH)), ids.to(codec.device), lengths.to(codec.device)
    )
    some = torch.tensor(tasks, device=codec.device)
    return [partial(action_loss, parts, pool, max(2, a.batch // 2), a.shift, some)]


def action_loss(parts: Parts, pool: ActionPool, batch: int, shift: float, tasks: Tensor) -> Tensor:
    """Error of the velocities of clips and rows; of ``tasks`` [K] one is drawn for each clip."""
    model, device = parts.model, pool.latents.device
    with torch.no_grad():
        index = (torch.rand(batch, device=device) * len(pool.latents)).long()
        clean, rows = pool.latents[index].float(), pool.rows[index]
        sigma = drawn_levels(batch, shift, device)
        task = tasks[(torch.rand(batch, 1, device=device) * len(tasks)).long()]
        frames = torch.arange(clean.shape[1], device=device)
        known_frames = (frames == 0) | (task == INVERSE)
        known_rows = (task == FORWARD).expand(-1, rows.shape[1])
        fps = torch.full((batch,), float(FPS), device=device)
        streams = (
            Video(clean, known_frames, fps),
            Actions(rows, known_rows, fps, DOMAIN, WIDTH),
        )
        noised, targets = mixed(streams, sigma)
    with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
        texts = model.understand(pool.ids[index])
        v = model.velocities(noised, (sigma * 1000).floor(), texts, pool.lengths[index])
    errors = [
        ((mine - target).square() * stream.free()).sum()
        / stream.free().expand_as(target).sum().clamp(min=1)
        for mine, target, stream in zip(v, targets, streams, strict=True)
    ]
    return errors[0] + errors[1]


# Transfer.


@dataclass(frozen=True, slots=True, eq=False)
class ControlPool:
    """Clips and what they follow: latents and controls [N, T, h, w, C], the texts of each control.

    ``none`` is the text that stands for a dropped prompt.
    """

    latents: Tensor
    controls: dict[str, Tensor]
    texts: dict[str, Texts]
    none: Texts
    fps: Tensor


def _draw_transfer(a: Namespace) -> tuple[Packed, dict[str, list[str]], list[str], list[int]]:
    count = max(8, a.pool // 4)
    scenes = scenes_at(range(a.first, a.first + count), Canvas(*a.size), grown=a.grown)
    texts = {
        control: [framed_transfer(draw_caption(s).text, control, s.canvas) for s in scenes]
        for control in ("edge", "seg")
    }
    none = [framed_transfer("", None, s.canvas) for s in scenes]
    return pack(scenes), texts, none, [s.canvas.fps for s in scenes]


def _transfer_losses(parts: Parts, drawn: Any, a: Namespace) -> list[Callable[[], Tensor]]:
    packed, texts, none, rates = drawn
    codec, canvas = parts.codec, parts.pool.canvas
    ids = {name: encoded(parts.tokenizer, some) for name, some in texts.items()}
    longest = max(len(x[0][0]) for x in ids.values())
    empty = encoded(parts.tokenizer, none, longest)
    ids = {name: encoded(parts.tokenizer, some, longest) for name, some in texts.items()}

    pool = ControlPool(
        torch.cat(list(_encoded_parts(codec, packed, canvas))),
        {
            "edge": torch.cat(list(_encoded_parts(codec, packed, canvas, edges_of))),
            "seg": torch.cat(list(_encoded_parts(codec, segmented(packed), canvas))),
        },
        {name: _moved(pair, codec.device) for name, pair in ids.items()},
        _moved(empty, codec.device),
        torch.tensor(rates, device=codec.device).float(),
    )
    batch = max(2, a.batch // 2)
    return [partial(transfer_loss, parts, pool, name, batch, a.shift) for name in pool.controls]


def transfer_loss(
    parts: Parts, pool: ControlPool, control: str, batch: int, shift: float, dropped: float = 0.1
) -> Tensor:
    """Error of the velocity of clips that follow a control, which comes before them in the sequence."""
    model, device = parts.model, pool.latents.device
    with torch.no_grad():
        index = (torch.rand(batch, device=device) * len(pool.latents)).long()
        sigma, fps = drawn_levels(batch, shift, device), pool.fps[index]
        drop = torch.rand(batch, device=device) < dropped
        text = torch.where(drop[:, None], pool.none[0][index], pool.texts[control][0][index])
        length = torch.where(drop, pool.none[1][index], pool.texts[control][1][index])
        clean = pool.latents[index].float()
        free = torch.zeros(clean.shape[:2], dtype=torch.bool, device=device)
        guide = Video(pool.controls[control][index].float(), ~free, fps)
        (_, noisy), (_, target) = mixed((guide, Video(clean, free, fps)), sigma)
    with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
        texts = model.understand(text)
        v = model.velocities((guide, noisy), (sigma * 1000).floor(), texts, length)[1]
    return (v - target).square().mean()


# Sound.


@dataclass(frozen=True, slots=True, eq=False)
class SoundPool:
    """Clips of one rate with their sound: latents [N, T, h, w, C], sounds [N, T_s, 64], texts.

    ``things`` [N, T, h, w] marks latent positions at which something is; ``none`` are dropped prompts.
    """

    latents: Tensor
    things: Tensor
    sounds: Tensor
    texts: Texts
    none: Texts
    fps: int


def _draw_sounds(a: Namespace) -> list[tuple[Packed, NDArray[np.float32], list[str], int]]:
    """Scenes of each rate: their sounds are of different lengths."""
    found = []
    for place, fps in enumerate(RATES):
        first, canvas = a.first + place * a.pool, Canvas(*a.size, fps)
        count = max(4, a.pool // 8)
        kinds = (GROWN if a.grown else BASIC) | QUIET
        scenes = [draw_scene(first + i, canvas, kinds, MATERIALS) for i in range(count)]
        sounds = np.stack([sound_of(scene) for scene in scenes])
        texts = [framed(draw_caption(scene).text, canvas) for scene in scenes]
        found.append((pack(scenes), sounds, texts, fps))
    return found


def _sound_losses(parts: Parts, drawn: Any, a: Namespace) -> list[Callable[[], Tensor]]:
    from training.package import sound_autoencoder  # here: other modes need no vLLM

    vae = sound_autoencoder(*SOUND_WIDTHS).to(parts.codec.device)
    vae.load_state_dict(load_file(a.sound))
    canvas, device = parts.pool.canvas, parts.codec.device
    # Without prompts, too, things have spots and sound: guidance would exaggerate what only prompts bring.
    flow, losses = Flow(shift=a.shift, things=a.things, dropped=0.2), []
    for packed, sounds, prompts, fps in drawn:
        texts = encoded(parts.tokenizer, prompts)
        bare = replace(canvas, fps=fps)
        empty = [framed(text, bare, negative=True) for text in NEGATIVES]
        none = encoded(parts.tokenizer, empty, texts[0].shape[1])
        pool = SoundPool(
            torch.cat(list(_encoded_parts(parts.codec, packed, canvas))),
            torch.cat(list(_occupied_parts(packed, canvas, device))),
            torch.cat([_heard(vae, part) for part in torch.from_numpy(sounds).split(32)]),
            _moved(texts, device),
            _moved(none, device),
            fps,
        )
        losses.append(partial(sound_loss, parts, pool, max(2, a.batch // 2), flow))
    return losses


@torch.no_grad()
def _heard(vae: torch.nn.Module, sounds: Tensor) -> Tensor:
    device = next(vae.parameters()).device
    padded = F.pad(sounds, (0, -sounds.shape[2] % HOP)).to(device)
    return latents_of(vae, padded).mT


def sound_loss(parts: Parts, pool: SoundPool, batch: int, flow: Flow) -> Tensor:
    """Error of the velocities of clips and their sounds, which are denoised together."""
    model, device = parts.model, pool.latents.device
    with torch.no_grad():
        index = (torch.rand(batch, device=device) * len(pool.latents)).long()
        clean, sigma = pool.latents[index].float(), drawn_levels(batch, flow.shift, device)
        fps = torch.full((batch,), float(pool.fps), device=device)
        first = torch.arange(clean.shape[1], device=device) == 0
        known = first & (torch.rand(batch, 1, device=device) < flow.one_given)
        drop = torch.rand(batch, device=device) < flow.dropped
        other = (torch.rand(batch, device=device) < flow.empty).long()
        asked = (pool.texts[0][index], pool.texts[1][index])
        text, length = with_dropped(asked, pool.none, other, drop)
        streams = (Video(clean, known, fps), Sound(pool.sounds[index]))
        noised, targets = mixed(streams, sigma)
        weight = weights_of(pool.things[index], (~known)[:, :, None, None], sigma, flow.things)
    with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
        texts = model.understand(text)
        v = model.velocities(noised, (sigma * 1000).floor(), texts, length)
    shown = ((v[0] - targets[0]).square().mean(-1) * weight).sum() / weight.sum()
    return shown + (v[1] - targets[1]).square().mean()


def edges_of(clips: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Edges of clips uint8 [B, T, H, W, 3] as the package finds them, white on black."""
    import cv2

    def one(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return np.asarray(cv2.Canny(np.ascontiguousarray(frame), *EDGES), np.uint8)

    with ThreadPoolExecutor(16) as pool:
        found = np.stack(list(pool.map(one, clips.reshape(-1, *clips.shape[2:]))))
    return np.repeat(found.reshape(clips.shape[:4])[..., None], 3, axis=4)


def _moved(texts: Texts, device: str) -> Texts:
    return texts[0].to(device), texts[1].to(device)


def _occupied_parts(
    packed: Packed, canvas: Canvas, device: str, batch: int = 32
) -> Iterator[Tensor]:
    """Latent positions at which something is, batch by batch."""
    for start in range(0, len(packed), batch):
        part = packed.take(slice(start, start + batch)).to(device)
        yield cells(occupied(render(part, canvas.height, canvas.width)))


def _encoded_parts(
    codec: Codec,
    packed: Packed,
    canvas: Canvas,
    change: Callable[[NDArray[np.uint8]], NDArray[np.uint8]] | None = None,
    batch: int = 32,
) -> Iterator[Tensor]:
    """Latents of clips, perhaps of what ``change`` makes of their frames, batch by batch."""
    for start in range(0, len(packed), batch):
        part = packed.take(slice(start, start + batch)).to(codec.device)
        pixels = render(part, canvas.height, canvas.width)
        if change is not None:
            changed = torch.from_numpy(change(to_bytes(pixels).cpu().numpy()))
            pixels = changed.to(codec.device).float() / 127.5 - 1
        yield codec.encode(pixels).bfloat16()


MODES = {
    "pictures": Mode(partial(_draw_sized, "pictures"), partial(_sized_losses, "pictures", 3.0), 7),
    "sizes": Mode(partial(_draw_sized, "sizes"), partial(_sized_losses, "sizes", 8.0), 8),
    "actions": Mode(_draw_actions, partial(_action_losses, (FORWARD, INVERSE, POLICY)), 3),
    "policy": Mode(_draw_actions, partial(_action_losses, (POLICY,)), 3),
    "transfer": Mode(_draw_transfer, _transfer_losses, 5),
    "sound": Mode(_draw_sounds, _sound_losses, 3),
}
