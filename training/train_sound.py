"""Training of the sound autoencoder on tones of contacts, drawn from scenes.

The modules are the package's own. Latents are drawn towards the standard normal distribution, which the
towers' noise starts from; the error is that of spectra, as nobody hears a phase.

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
from training.scenes import GROWN, MATERIALS, Canvas, draw_scene
from training.shares import Share
from training.sounds import PITCHES, RATE, sound_of, tones_in

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HELD_OUT = 30_000_000  # first seed
HOP = 1920
SOUND_WIDTHS = (4, 4)  # of decoder and encoder, in the published folder too
WINDOWS = (256, 1024, 4096)


def waveforms(first: int, count: int, samples: int) -> Tensor:
    """Sounds of scenes [N, 2, samples] from a random moment on, a third of them silent."""
    rng = np.random.RandomState(first % 2**32)
    out = np.zeros((count, 2, samples), np.float32)
    for i in range(count):
        scene = draw_scene(first + i, Canvas(fps=8), GROWN, MATERIALS)
        sound = sound_of(scene)
        start = rng.randint(max(1, sound.shape[1] - samples // 2))
        part = sound[:, start : start + samples]
        out[i, :, : part.shape[1]] = part
    return torch.from_numpy(out)


def moments(vae: nn.Module, sound: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation [B, 64, S / 1920] of the posterior; sounds are as loud as they are."""
    mean, scale = vae.encoder(sound).float().chunk(2, 1)
    return mean, F.softplus(scale) + 1e-4


def loss_of(vae: nn.Module, sound: Tensor, kl_weight: float) -> Tensor:
    """Error of the spectra and a little of the samples, and the distance from the prior."""
    mean, deviation = moments(vae, sound)
    made = vae.decoder(mean + deviation * torch.randn_like(mean)).float()
    error = (made - sound).abs().mean()
    for size in WINDOWS:
        window = torch.hann_window(size, device=sound.device)
        theirs, mine = (
            torch.stft(x.flatten(0, 1), size, size // 4, window=window, return_complex=True)
            .abs()
            .clamp(min=1e-5)
            for x in (sound, made)
        )
        error = (
            error + (mine - theirs).abs().mean() + 0.1 * (mine.log() - theirs.log()).abs().mean()
        )
    kl = 0.5 * (mean.square() + deviation.square() - 1 - 2 * deviation.log()).mean()
    return error + kl_weight * kl


def main(argv: list[str] | None = None) -> None:
    from training.package import sound_autoencoder  # here: other trainings need no vLLM

    a = _arguments(argv)
    began, out = time.time(), Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(a.first)
    data = waveforms(a.first, a.pool, a.hops * HOP).to(DEVICE)
    print(f"{a.pool} sounds in {time.time() - began:.1f} s", flush=True)
    vae = sound_autoencoder(*SOUND_WIDTHS).to(DEVICE)
    for name, p in vae.named_parameters():
        if name.endswith("weight_v"):
            nn.init.kaiming_normal_(p)

    def loss() -> Tensor:
        index = (torch.rand(a.batch, device=DEVICE) * a.pool).long()
        return loss_of(vae, data[index], a.kl)

    plan = Plan(
        seconds=a.seconds, steps=a.steps, rate=a.rate, hold=0.2, decay=1e-4, ema=0.998,
        label="sound", every=a.every,
    )  # fmt: skip
    log = train(list(vae.named_parameters()), [Kind(loss)], plan)
    log |= evaluate(vae, a.judged)
    tensors = {name: p.detach().float().cpu().contiguous() for name, p in vae.named_parameters()}
    save_file(tensors, out / "sound.safetensors", {"format": "pt"})
    (out / "sound.json").write_text(json.dumps(log))
    print(f"sound done after {time.time() - began:.0f} s", flush=True)


@torch.no_grad()
def evaluate(vae: nn.Module, count: int) -> dict[str, object]:
    """Held-out sounds whose one tone is heard again, on time, after the autoencoder; spread of the latents."""
    right, latents = 0, []
    for i in range(count):
        scene = draw_scene(HELD_OUT + i, Canvas(fps=8), {"push": 1}, MATERIALS)
        sound = torch.from_numpy(sound_of(scene))
        padded = F.pad(sound, (0, -sound.shape[1] % HOP)).to(DEVICE)[None]
        mean, _ = moments(vae, padded)
        latents.append(mean.flatten())
        heard = tones_in(vae.decoder(mean)[0].float().cpu().numpy())
        at, material = scene.contacts[0][0] / scene.canvas.fps, scene.contacts[0][1]
        right += [t.material for t in heard] == [material] and abs(heard[0].seconds - at) < 0.06
    result = {
        "heard again": str(Share(right, count)),
        "spread": round(float(torch.cat(latents).std()), 3),
    }
    print(json.dumps(result), flush=True)
    return result


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add: Callable[..., object] = p.add_argument
    add("out")
    add("--seconds", type=float, default=120)
    add("--steps", type=int, help="at most")
    add("--hops", type=int, default=25, help="length of a sound, in latents")
    add("--batch", type=int, default=32)
    add("--rate", type=float, default=1e-3)
    add("--pool", type=int, default=8192, help="sounds")
    add("--first", type=int, default=8_000_000, help="seed of the first scene")
    add("--kl", type=float, default=0.05)
    add("--judged", type=int, default=256)
    add("--every", type=int, default=500)
    return p.parse_args(argv)


assert set(PITCHES) == set(MATERIALS)
assert RATE == 25 * HOP

if __name__ == "__main__":
    main()
