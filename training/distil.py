"""Distillation of the generation tower to four steps without guidance: a video after a picture.

The student learns where the teacher's guided path ends, from each of the four noise levels of the
published distilled models: a consistency function by simulation. The solver adds fresh noise after each
step, so that every level starts from clips as they are in the world. The text tower stays as it is, and
what is stored are the tensors that differ.

``python -m training.distil OUT VAE_FOLDER TOKENIZER_JSON --init TOWERS... --seconds 480``
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from training import ranks
from training.captions import Caption
from training.observing import confirm_all
from training.optimisation import Kind, Plan, train
from training.pools import Codec, Pool, draw, held_out, make_pool
from training.prompts import encoded, framed
from training.rendering import pack, render
from training.sampling import guided, sample
from training.scenes import Canvas, Scene
from training.shares import confirmed_shares
from training.streams import Video
from training.transformer import (
    Shape,
    Transformer,
    compile_layers,
    is_text,
    save_changed,
    uncompile_layers,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LEVELS = (1.0, 15 / 16, 5 / 6, 5 / 8)  # of the published distilled models
FPS = 16.0  # base rate by which image-to-video is told from the others
HELD_OUT = 20_000_000


def path_from(level: float, steps: int, shift: float) -> list[float]:
    """Noise levels from ``level`` to 0, as a schedule with this shift would have them from there on."""
    level = min(level, 0.999)
    u = level / (shift - (shift - 1) * level)
    parts = [u * (1 - j / steps) for j in range(steps)]
    return [shift * p / (1 + (shift - 1) * p) for p in parts] + [0.0]


def end_loss(
    student: Transformer, teacher: Transformer, pool: Pool, batch: int, guidance: float, steps: int
) -> Tensor:
    """Error of the velocities that lead to the ends of the teacher's paths; as many clips at each level."""
    device = pool.latents.device
    losses = []
    for level in LEVELS:
        with torch.no_grad():
            index = (torch.rand(batch, device=device) * len(pool.latents)).long()
            clean = pool.latents[index].float()
            known = (torch.arange(clean.shape[1], device=device) == 0).expand(batch, -1)
            free = ~known[:, :, None, None, None]
            x = torch.where(free, clean + level * (torch.randn_like(clean) - clean), clean)
            (ids, lengths), (none, none_lengths) = pool.plain, pool.none
            both = torch.cat([ids[index], none[pool.which[index] * 2]])
            long = torch.cat([lengths[index], none_lengths[pool.which[index] * 2]])
            fps = pool.fps[index]
            with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
                velocity = guided(teacher, both, long, fps, known, guidance)
                end = sample(velocity, x, free, path_from(level, steps, 10.0))
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            texts = student.understand(ids[index])
            timestep = torch.full((batch,), 1000 * level, device=device)
            (v,) = student.velocities([Video(x, known, fps)], timestep, texts, lengths[index])
        losses.append(((v - (x - end) / level).square() * free).mean())
    return torch.stack(losses).mean()


@torch.no_grad()
def four_steps(velocity: object, x: Tensor, free: Tensor, seed: int) -> Tensor:
    """The product's solver for distilled models: to an estimate, and back to the next level."""
    generator = torch.Generator().manual_seed(seed)
    clean = x
    for level, following in zip(LEVELS, (*LEVELS[1:], 0.0), strict=True):
        estimate = x - level * velocity(x, 1000 * level)  # type: ignore[operator]
        noise = torch.randn(x.shape, generator=generator).to(x.device)
        x = torch.where(free, (1 - following) * estimate + following * noise, clean)
    return x


@torch.no_grad()
def judge(
    student: Transformer, codec: Codec, tokenizer: Tokenizer, canvas: Canvas, count: int
) -> dict[str, str]:
    """Shares of held-out prompts that clips after the true first frame confirm."""
    scenes, captions = held_out(HELD_OUT, count, canvas)
    results: list[dict[str, bool]] = []
    for i in range(0, count, 128):
        some, words = scenes[i : i + 128], captions[i : i + 128]
        clips = _clips(student, codec, tokenizer, some, words, seed=i)
        results += confirm_all(some, words, clips)
    return {name: str(share) for name, share in confirmed_shares(results).items()}


def _clips(
    student: Transformer,
    codec: Codec,
    tokenizer: Tokenizer,
    scenes: Sequence[Scene],
    captions: Sequence[Caption],
    *,
    seed: int,
) -> Tensor:
    canvas = scenes[0].canvas
    first = codec.encode(
        render(pack(scenes).frames([0]).to(codec.device), canvas.height, canvas.width)
    )
    frames = (canvas.frames - 1) // 4 + 1
    noise = torch.randn(
        (len(scenes), frames, *first.shape[2:]), generator=torch.Generator().manual_seed(seed)
    )
    x = noise.to(codec.device)
    x[:, :1] = first
    known = (torch.arange(frames, device=codec.device) == 0).expand(len(scenes), -1)
    texts = [framed(c.text, s.canvas) for s, c in zip(scenes, captions, strict=True)]
    ids, lengths = (t.to(codec.device) for t in encoded(tokenizer, texts))
    fps = torch.tensor([float(s.canvas.fps) for s in scenes], device=codec.device)
    with torch.autocast(codec.device, torch.bfloat16):
        velocity = guided(student, ids, lengths, fps, known, 1)
        latents = four_steps(velocity, x, ~known[:, :, None, None, None], seed + 1)
    return codec.decode(latents)


def main(argv: list[str] | None = None) -> None:
    a = _arguments(argv)
    a.first += ranks.rank() * ranks.SEEDS
    began, out, canvas = time.time(), Path(a.out), Canvas(*a.size)
    out.mkdir(parents=True, exist_ok=True)
    drawn = draw(a.first, a.pool, canvas, grown=a.grown, workers=a.workers)
    ranks.join()
    torch.manual_seed(a.first + 3)
    tokenizer = Tokenizer.from_file(a.tokenizer)
    codec = Codec(Path(a.vae), a.encoder, a.decoder, DEVICE)
    pool = make_pool(drawn, canvas, codec, tokenizer)
    teacher = Transformer(Shape()).to(DEVICE).requires_grad_(requires_grad=False)
    tensors = {k: v.float() for file in a.init for k, v in load_file(file).items()}
    teacher.load_state_dict({k: tensors[k] for k in teacher.state_dict()})
    student = copy.deepcopy(teacher)
    student.shape = replace(student.shape, base_fps=FPS)
    for name, p in student.named_parameters():
        p.requires_grad_(not is_text(name))
    if a.compile:
        for model in (teacher, student):
            compile_layers(model, flexible=a.flexible)
    plan = Plan(
        seconds=a.seconds, steps=a.steps, rate=a.rate, muon_rate=a.muon_rate, label="distil",
        every=a.every,
    )  # fmt: skip
    loss = partial(
        end_loss, student, teacher, pool, max(1, a.batch // len(LEVELS)), a.guidance, a.path
    )
    log = train(list(student.named_parameters()), [Kind(loss)], plan)
    ranks.leave()
    if ranks.rank():  # all have the same weights: one scores them
        return
    uncompile_layers(student)
    save_changed(student, out)
    with torch.no_grad():  # judged as they are stored
        for p in student.parameters():
            p.copy_(p.to(torch.bfloat16).float())
    log |= {"scores": judge(student, codec, tokenizer, canvas, a.judged), "arguments": vars(a)}
    (out / "distil.json").write_text(json.dumps(log))
    print(json.dumps(log["scores"]), f"{time.time() - began:.0f} s", flush=True)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("out")
    p.add_argument("vae", help="folder with vae.safetensors and vae.json, or a checkpoint")
    p.add_argument("tokenizer", help="tokenizer.json")
    p.add_argument("--init", nargs="+", required=True, help="safetensors of the teacher")
    p.add_argument("--size", type=int, nargs=3, default=(320, 192, 17), help="width height frames")
    p.add_argument("--seconds", type=float, default=480)
    p.add_argument("--steps", type=int, help="at most")
    p.add_argument("--guidance", type=float, default=3.0, help="of the teacher")
    p.add_argument("--path", type=int, default=8, help="steps of the teacher's paths")
    p.add_argument("--first", type=int, default=4_000_000, help="seed of the first scene")
    p.add_argument("--pool", type=int, default=24576, help="clips")
    p.add_argument("--grown", action="store_true", help="all kinds of scenes")
    p.add_argument("--batch", type=int, default=192, help="clips in a step")
    p.add_argument("--rate", type=float, default=6e-4)
    p.add_argument("--muon-rate", type=float, default=2e-3)
    p.add_argument("--encoder", type=int, default=8)
    p.add_argument("--decoder", type=int, default=16)
    p.add_argument("--judged", type=int, default=768)
    p.add_argument("--every", type=int, default=200)
    p.add_argument("--workers", type=int, default=12 if DEVICE == "cuda" else 1)
    p.add_argument("--compile", action="store_true")
    p.add_argument("--flexible", action="store_true", help="attention as a Triton kernel")
    return p.parse_args(argv)


if __name__ == "__main__":
    main()
