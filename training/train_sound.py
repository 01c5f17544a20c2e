"""Training of the sound autoencoder on tones of contacts, drawn from scenes.

The modules are the package's own. The error is relative to what should be heard, so that silence costs 1, and
the lengths of the weights stay what they were, so that it cannot fall by making everything quieter. Latents
are decoded with noise, as the towers get them slightly wrong, and kept near the normal distribution,
which the towers' noise starts from. It ends with an error, and without weights, unless held-out tones and silence are heard again.

``python -m training.train_sound OUT --seconds 120``
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from training.optimisation import Kind, Plan, train
from training.scenes import MATERIALS, Scene, draw_scene
from training.shares import Share
from training.sounds import PITCHES, RATE, Tone, sound_of, tones_in

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HELD_OUT = 30_000_000  # first seed
HOP = 1920
SOUND_WIDTHS = (4, 4)  # of decoder and encoder, in the published folder too
SOUNDING = {"push": 1, "lift": 1, "drop": 1, "bounce": 1, "stack": 1}  # kinds of scenes with a tone
NOISE = 0.3  # standard deviations
_SMOOTH = (2, 4, 8)  # strides whose kernels begin as windows; the others have to make the waves


def windows(first: int, count: int, hops: int) -> Tensor:
    """Parts of sounds [N, 2, hops * 1920] with a tone or soon after it, on the grid of the latents."""
    rng = np.random.RandomState(first % 2**32)
    out = np.zeros((count, 2, hops * HOP), np.float32)
    for i in range(count):
        scene = draw_scene(first + i, None, SOUNDING, MATERIALS)
        onset = int(scene.contacts[0][0] / scene.canvas.fps * RATE)
        start = max(0, onset // HOP - rng.randint(-8, hops)) * HOP
        part = sound_of(scene)[:, start : start + hops * HOP]
        out[i, :, : part.shape[1]] = part
    return torch.from_numpy(out)


@torch.no_grad()
def initialise(vae: nn.Module) -> None:
    """Weights that keep the size of what they are given; a decoder that fills up smoothly.

    Lengths of weights are not trained: the quickest way down would be a shorter last one, and it ends in silence.
    """
    tensors = dict(vae.named_parameters())
    for name, v in tensors.items():
        if not name.endswith("weight_v"):
            continue
        nn.init.normal_(v, std=0.25)  # a step of 0.01 turns them by 4 %
        length = tensors[name.removesuffix("_v") + "_g"]
        length.requires_grad = False
        if ".conv_t1." in name:  # a kernel is two strides long
            before, after, kernel = v.shape
            length.fill_((after * kernel / 2 / before) ** 0.5)
            if kernel // 2 in _SMOOTH:
                v.copy_(v[:, :, :1] * torch.hann_window(kernel, device=v.device))
        elif name.startswith("decoder.") and v.shape[2] > 1:
            v[:, :, torch.arange(v.shape[2]) != v.shape[2] // 2] *= 0.3
        if ".res_unit" in name and ".conv2." in name:
            length.fill_(0.2)
    tensors["decoder.conv2.weight_g"].fill_(0.2)
    for name, p in tensors.items():
        if name.endswith((".alpha", ".beta")):  # logarithms: activations begin as almost linear
            p.fill_(-1.4)


def latents_of(vae: nn.Module, sound: Tensor) -> Tensor:
    """Latents [B, 64, S / 1920] of sounds as loud as they are: the posterior's mean.

    The package reads nothing else of it, and its deviation is not trained.
    """
    mean: Tensor = vae.encoder(sound).float().chunk(2, 1)[0]
    return mean


def loss_of(vae: nn.Module, sound: Tensor) -> Tensor:
    """Error of the samples, 1 for silence, and the divergence of the latents' moments from the prior's.

    Three times as much silence belongs to the moments: clips are mostly silent.
    """
    latents = latents_of(vae, torch.cat([sound, sound.new_zeros(sound.shape).repeat(3, 1, 1)]))
    noisy = latents[: len(sound)] + NOISE * torch.randn_like(latents[: len(sound)])
    wrong = (vae.decoder(noisy).float() - sound).square().mean()
    error = (wrong / (sound.square().mean() + 1e-4)).sqrt()  # finite where all is silent
    variance, mean = torch.var_mean(latents, dim=(0, 2))
    return error + 0.05 * (mean.square() + variance - 1 - (variance + 1e-6).log()).mean()


def main(argv: list[str] | None = None) -> None:
    from training.package import sound_autoencoder  # here: other trainings need no vLLM

    a = _arguments(argv)
    began, out = time.time(), Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(a.first)
    data = windows(a.first, a.pool, a.hops).to(DEVICE)
    print(f"{a.pool} windows in {time.time() - began:.1f} s", flush=True)
    vae = sound_autoencoder(*SOUND_WIDTHS).to(DEVICE)
    initialise(vae)

    def loss() -> Tensor:
        index = (torch.rand(a.batch, device=DEVICE) * a.pool).long()
        return loss_of(vae, data[index])

    plan = Plan(
        seconds=a.seconds, steps=a.steps, rate=a.rate, warmup=20, hold=0.2, decay=0, ema=0.99,
        label="sound", every=a.every,
    )  # fmt: skip
    log = train(list(vae.named_parameters()), [Kind(loss)], plan)
    scores, least = evaluate(vae, a.judged)
    (out / "sound.json").write_text(json.dumps(log | scores))
    if least < a.least:
        raise SystemExit(
            f"heard again: {least:.3f} of held-out tones or silence, must be at least {a.least} (--least): "
            "nothing can be learned from these latents, no weights are written"
        )
    tensors = {name: p.detach().float().cpu().contiguous() for name, p in vae.named_parameters()}
    save_file(tensors, out / "sound.safetensors", {"format": "pt"})
    print(f"sound done after {time.time() - began:.0f} s", flush=True)


@torch.no_grad()
def evaluate(vae: nn.Module, count: int) -> tuple[dict[str, object], float]:
    """Held-out sounds whose one tone is heard again on time, silence that stays silent, spread of the latents.

    Also the smaller one of both shares.
    """
    latents = []

    def heard_again(scene: Scene) -> list[Tone]:
        sound = torch.from_numpy(sound_of(scene))
        padded = F.pad(sound, (0, -sound.shape[1] % HOP)).to(DEVICE)[None]
        latents.append(latents_of(vae, padded))
        return tones_in(vae.decoder(latents[-1])[0].float().cpu().numpy())

    right = silent = 0
    for seed in range(HELD_OUT, HELD_OUT + count):
        scene = draw_scene(seed, None, SOUNDING, MATERIALS)
        heard, (frame, material) = heard_again(scene), scene.contacts[0]
        on_time = bool(heard) and abs(heard[0].seconds - frame / scene.canvas.fps) < 0.06
        right += on_time and [tone.material for tone in heard] == [material]
    spread = round(float(torch.cat(latents, 2).std()), 3)
    for seed in range(HELD_OUT, HELD_OUT + count):
        silent += heard_again(draw_scene(seed, None, {"single": 1}, MATERIALS)) == []
    scores = {
        "heard again": str(Share(right, count)),
        "silence again": str(Share(silent, count)),
        "spread": spread,
    }
    print(json.dumps(scores), flush=True)
    return scores, min(right, silent) / count


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add: Callable[..., object] = p.add_argument
    add("out")
    add("--seconds", type=float, default=120)
    add("--steps", type=int, help="at most")
    add("--hops", type=int, default=8, help="length of a window, in latents")
    add("--batch", type=int, default=32)
    add("--rate", type=float, default=1e-2)
    add("--pool", type=int, default=8192, help="windows")
    add("--first", type=int, default=8_000_000, help="seed of the first scene")
    add("--judged", type=int, default=256)
    add(
        "--least", type=float, default=0.95, help="share of held-out tones that must be heard again"
    )
    add("--every", type=int, default=500)
    return p.parse_args(argv)


assert set(PITCHES) == set(MATERIALS)
assert RATE == 25 * HOP

if __name__ == "__main__":
    main()
