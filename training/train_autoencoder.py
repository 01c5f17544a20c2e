"""Training of the video autoencoder: windows around things, then whole clips, drawn while it runs.

``python -m training.train_autoencoder OUT --windows 100 --clips 90``
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.autoencoder import LATENTS, Autoencoder, compile_blocks
from training.captions import draw_caption
from training.observing import confirm_all
from training.optimisation import Kind, Plan, train
from training.rendering import Packed, occupied, pack, render, to_bytes
from training.scenes import GROWN, MATERIALS, Canvas, draw_scene
from training.shares import confirmed_shares

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HELD_OUT = 10_000_000  # first seed of clips that are not trained on


def scenes_of(first: int, count: int, canvas: Canvas) -> Packed:
    """Numbers of ``count`` scenes of all kinds; two things in five have a spot."""
    spots = ("rubber", "rubber", *MATERIALS)
    scenes = [draw_scene(first + i, canvas, GROWN, spots) for i in range(count)]
    return pack(scenes).to(DEVICE)


def windows(data: Packed, canvas: Canvas, height: int, width: int, frames: int) -> Tensor:
    """Pixels of windows around a thing, of ``frames`` frames in a row."""
    things = data.things
    count, total = things.shape[0], things.shape[2]
    start = (torch.rand(count, device=things.device) * (total - frames + 1)).long()
    when = start[:, None] + torch.arange(frames, device=things.device)
    things = things.gather(2, when[:, None, :, None].expand(-1, things.shape[1], -1, 8))
    gripper = data.gripper.gather(1, when[:, :, None].expand(-1, -1, 4))
    present = (things[:, :, 0, 2] > 0).sum(1)
    which = (torch.rand(count, device=things.device) * present).long()
    centre = things[torch.arange(count, device=things.device), which, frames // 2, :2]
    jitter = (torch.rand(count, 2, device=things.device) - 0.5) * 0.8
    axes = (0, width, canvas.width), (1, height, canvas.height)
    corner = torch.stack(
        [
            (centre[:, axis] + (jitter[:, axis] - 0.5) * span).clamp(0, whole - span).round()
            for axis, span, whole in axes
        ],
        1,
    )
    return render(
        Packed(things, gripper, data.tone), height, width,
        canvas_height=canvas.height, corner=corner,
    )  # fmt: skip


def loss_of(vae: Autoencoder, pixels: Tensor, kl_weight: float, most: float) -> Tensor:
    """Weighted error and the posterior's distance from the prior.

    Latents get up to ``most`` standard deviations of noise beside the posterior's own, so that the
    decoder forgives what a transformer gets slightly wrong and outlines are spread over what a
    latent has. The deviation is the batch's and has a gradient: larger latents do not help.
    """
    with torch.no_grad():
        weight = 1 + 4 * occupied(pixels).float().unsqueeze(-1)
    with torch.autocast(DEVICE, torch.bfloat16, cache_enabled=False):
        mean, log_var = vae.moments(pixels)
        level = most * torch.rand((len(pixels), 1, 1, 1, 1), device=DEVICE)
        variance = mean.var((0, 1, 2, 3)) * level.square() + log_var.exp() * vae.used
        out = vae.pixels(mean + torch.randn_like(mean) * (variance + 1e-8).sqrt())
    difference = (out - pixels) * weight
    kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum() / pixels.numel()
    return difference.abs().mean() + (difference * (out - pixels)).mean() + kl_weight * kl


def main() -> None:
    a = _arguments()
    began = time.time()
    out = Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    canvas = Canvas(*a.size)
    data = scenes_of(a.first, a.pool, canvas)
    print(f"{a.pool} scenes in {time.time() - began:.1f} s", flush=True)
    torch.manual_seed(a.first)
    torch.backends.cudnn.benchmark = True
    if a.compile:
        compile_blocks()
    vae = Autoencoder(a.encoder, a.decoder, a.used).to(DEVICE)
    if a.init:
        vae.load_state_dict({k: v.float() for k, v in load_file(a.init).items()})
    if a.decoder_only:
        for module in (vae.encoder, vae.quant_conv):
            module.requires_grad_(requires_grad=False)
    logs = []
    phases = (
        ("windows", a.windows, a.rate, 0.0, 0.5 * a.noise, a.batch),
        ("clips", a.clips, a.rate / 2, 0.2, a.noise, a.clips_batch),
    )
    for label, seconds, rate, hold, noise, batch in phases:
        if seconds <= 0:
            continue

        def loss(label: str = label, noise: float = noise, batch: int = batch) -> Tensor:
            with torch.no_grad():
                index = (torch.rand(batch, device=DEVICE) * a.pool).long()
                taken = data.take(index)
                if label == "windows":
                    pixels = windows(taken, canvas, *a.window)
                else:
                    pixels = render(taken, canvas.height, canvas.width)
            return loss_of(vae, pixels, a.kl, noise)

        plan = Plan(
            seconds=seconds, steps=a.steps, rate=rate, hold=hold, decay=1e-4, ema=0.998,
            label=label, every=a.every,
        )  # fmt: skip
        logs.append(train(list(vae.named_parameters()), [Kind(loss)], plan))
        save(vae, out, {"training": logs})
    facts = {"training": logs} | evaluate(vae, a.judged, canvas)
    save(vae, out, facts)
    (out / "vae.json").write_text(json.dumps(facts))
    print(f"autoencoder done after {time.time() - began:.0f} s", flush=True)


@torch.no_grad()
def evaluate(vae: Autoencoder, count: int, canvas: Canvas) -> dict[str, object]:
    """Held-out quality with weights as they are stored, and the statistics of the latents."""
    for p in vae.parameters():
        p.copy_(p.to(torch.bfloat16).float())
    scenes = [draw_scene(HELD_OUT + i, canvas, GROWN) for i in range(count)]
    data = pack(scenes).to(DEVICE)
    errors, inside, means, variances = [], [], [], []
    clips: dict[float, list[Tensor]] = {0.0: [], 0.25: [], 0.5: []}
    for part in torch.arange(count, device=DEVICE).split(16):
        pixels = render(data.take(part), canvas.height, canvas.width)
        with torch.autocast(DEVICE, torch.bfloat16):
            mean, log_var = vae.moments(pixels)
        means.append(mean.flatten(0, 3))
        variances.append(log_var.flatten(0, 3).exp())
        for level, made in clips.items():
            noise = torch.randn_like(mean) * mean.std((0, 1, 2, 3))
            with torch.autocast(DEVICE, torch.bfloat16):
                decoded = vae.pixels(mean + level * noise).clamp(-1, 1)
            made.append(to_bytes(decoded))
            if level == 0:
                error = (decoded - pixels).square()
                errors.append(error.mean((1, 2, 3, 4)))
                there = occupied(pixels).unsqueeze(-1)
                inside.append((error * there).sum((1, 2, 3, 4)) / there.sum((1, 2, 3, 4)) / 3)
    mean, noise = torch.cat(means), torch.cat(variances).mean(0)
    spread, used = mean.var(0), vae.used
    captions = [draw_caption(scene) for scene in scenes]
    confirmed = {
        f"confirmed at noise {level:g}": {
            name: round(share.value, 3)
            for name, share in confirmed_shares(
                confirm_all(scenes, captions, torch.cat(made))
            ).items()
        }
        for level, made in clips.items()
    }
    # A channel's standard deviation includes the posterior's noise: what carries little stays small.
    std = torch.where(used > 0, (spread + noise).sqrt(), 1.0)
    result: dict[str, object] = {
        "psnr": round(_psnr(torch.cat(errors)), 2),
        "psnr_things": round(_psnr(torch.cat(inside)), 2),
        **confirmed,
        "posterior_std": [round(x, 3) for x in noise.sqrt()[used > 0].tolist()],
        "spread": [round(x, 3) for x in spread.sqrt()[used > 0].tolist()],
        "parameters": sum(p.numel() for p in vae.parameters()),
    }
    print(json.dumps(result), flush=True)
    return result | {
        "used": int(used.sum()),
        "mean": [round(x, 4) for x in (mean.mean(0) * used).tolist()],
        "std": [round(x, 4) for x in std.tolist()],
    }


def _psnr(errors: Tensor) -> float:
    """Mean of the clips' PSNR; pixels span 2."""
    return float((10 * math.log10(4) - 10 * errors.clamp(min=1e-12).log10()).mean())


def save(vae: Autoencoder, out: Path, facts: dict[str, object]) -> None:
    """The weights in bfloat16 beside what is known of them."""
    tensors = {n: v.to(torch.bfloat16).contiguous() for n, v in vae.state_dict().items()}
    save_file(tensors, out / "vae.safetensors", {"format": "pt"})
    (out / "vae.json").write_text(json.dumps(facts))


def _arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("out")
    p.add_argument("--windows", type=float, default=100, help="seconds on windows around things")
    p.add_argument("--clips", type=float, default=90, help="seconds on whole clips")
    p.add_argument("--window", type=int, nargs=3, default=(96, 128, 9), help="height width frames")
    p.add_argument("--size", type=int, nargs=3, default=(320, 192, 17), help="width height frames")
    p.add_argument("--steps", type=int, help="at most, of each")
    p.add_argument("--batch", type=int, default=24, help="windows in a step")
    p.add_argument("--clips-batch", type=int, default=6, help="clips in a step")
    p.add_argument("--rate", type=float, default=2e-3, help="of windows, half of it for clips")
    p.add_argument("--pool", type=int, default=32768, help="scenes")
    p.add_argument("--first", type=int, default=0, help="seed of the first scene")
    p.add_argument("--kl", type=float, default=0.01)
    p.add_argument("--noise", type=float, default=0.5, help="in latents, standard deviations")
    p.add_argument("--encoder", type=int, default=8)
    p.add_argument("--decoder", type=int, default=16)
    p.add_argument("--used", type=int, default=16, help=f"latent channels, at most {LATENTS}")
    p.add_argument("--judged", type=int, default=256)
    p.add_argument("--every", type=int, default=500)
    p.add_argument("--init", help="weights to start from")
    p.add_argument(
        "--decoder-only",
        action="store_true",
        help="leave the latents, and what was trained on them",
    )
    p.add_argument("--compile", action="store_true")
    return p.parse_args()


if __name__ == "__main__":
    main()
