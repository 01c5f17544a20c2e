"""Training of both towers and the vision encoder: flow matching on latents, and chats about clips.

Both losses are in the same steps, so that the towers agree by construction. Noise levels are those
of the product's own schedule. ``--init`` goes on from weights, with a new warm-up.

``python -m training.train_towers OUT VAE_FOLDER TOKENIZER_JSON --seconds 600``
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from training import ranks
from training.contact_sheet import write_sheet
from training.flow import Flow, flow_loss
from training.judging import PROMPTS, Setting, generated, judge, judge_questions, judge_reasoner
from training.modes import MODES, draw_modes, kinds_of
from training.optimisation import Kind, Plan, train
from training.parts import DEVICE, Parts, assemble, named
from training.pools import draw
from training.rendering import Packed, render
from training.scenes import Canvas
from training.transformer import (
    Transformer,
    compile_layers,
    save_changed,
    uncompile_layers,
)
from training.vision import Chats, VisionEncoder, hidden_states

SHARDS = {"transformer": 2, "vision": 1}  # files of less than 16 MiB


def chat_loss(
    model: Transformer,
    vision: VisionEncoder,
    chats: Chats,
    clips: Packed,
    canvas: Canvas,
    batch: int,
) -> Tensor:
    """Cross entropy of the tokens of answers about a batch of clips, of which four frames are seen."""
    device = chats.ids.device
    with torch.no_grad():
        index = (torch.rand(batch, device=device) * len(chats.ids)).long()
        pixels = render(clips.take(index), canvas.height, canvas.width)
        ids, slot, target = chats.ids[index], chats.slot[index], chats.target[index]
        places = chats.places[:, index]
    with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
        out = model.lm_head(hidden_states(model, vision, pixels, ids, slot, places))
    loss = nn.functional.cross_entropy(
        out[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    wanted = target[:, :-1].flatten().float()
    return (loss * wanted).sum() / wanted.sum()


def losses(parts: Parts, a: argparse.Namespace, held: Tensor) -> list[Kind]:
    """The kinds of steps; ``held`` keeps the flow's and the chats' last loss."""
    flow = Flow(shift=a.shift, things=a.things)

    def chatting() -> Tensor:
        chatted = chat_loss(
            parts.model, parts.vision, parts.chats, parts.clips, parts.pool.canvas, a.chats
        )
        held[1].copy_(chatted.detach())
        return chatted

    def plain() -> Tensor:
        flowed = flow_loss(parts.model, parts.pool, a.batch, flow, structured=False)
        held[0].copy_(flowed.detach())
        if not a.chats or a.generation_only:
            return flowed
        return flowed + 0.2 * chatting()

    def structured() -> Tensor:
        return flow_loss(parts.model, parts.pool, a.batch, flow, structured=True)

    if a.changed:
        return []
    if a.vision_only:
        return [Kind(chatting)]
    kinds = [Kind(plain)]
    return [*kinds, Kind(structured, a.structured_every)] if a.structured_every else kinds


def main() -> None:
    a = arguments()
    a.first += ranks.rank() * ranks.SEEDS
    began = time.time()
    out = Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    canvas = Canvas(*a.size)
    # Where only --modes are learnt, a few clips stand for the rest of the data.
    drawn = draw(a.first, 64 if a.changed else a.pool, canvas, grown=a.grown, workers=a.workers)
    modes = draw_modes(a)
    print(f"{a.pool} scenes in {time.time() - began:.1f} s", flush=True)
    ranks.join()
    torch.manual_seed(a.first + 1)
    torch.backends.cudnn.benchmark = True
    parts = assemble(a, drawn, canvas)
    if a.compile:
        compile_layers(parts.model, flexible=a.flexible)
    held = torch.zeros(2, device=DEVICE)
    plan = Plan(
        seconds=a.seconds, steps=a.steps, rate=a.rate, muon_rate=a.muon_rate, hold=a.hold,
        warmup=a.warmup, ema=a.ema, label="towers", every=a.every,
    )  # fmt: skip
    kinds = [*losses(parts, a, held), *kinds_of(parts, modes, a)]
    log = train(named(parts), kinds, plan, None if a.changed else lambda: save(parts, out))
    ranks.leave()
    if ranks.rank():  # all have the same weights: one scores them
        return
    uncompile_layers(parts.model)
    if a.changed:
        save_changed(parts.model, out)
        return
    save(parts, out)
    flowed, chatted = held.tolist()
    log |= {"flow_loss": flowed, "chat_loss": chatted, "arguments": vars(a)}
    print(f"flow {flowed:.4f}, chats {chatted:.4f}, {time.time() - began:.0f} s", flush=True)
    with torch.no_grad():  # judged as they are stored
        for _, p in named(parts):
            p.copy_(p.to(torch.bfloat16).float())
    report(parts, a, out, log)
    print(f"towers done after {time.time() - began:.0f} s", flush=True)


def report(parts: Parts, a: argparse.Namespace, out: Path, log: dict[str, object]) -> None:
    """Scores and a contact sheet; what is known is written after each."""
    scores: dict[str, object] = {}
    log["scores"] = scores
    for setting in map(Setting.read, a.settings):
        scores[str(setting)] = judge(parts, setting, a.judged)
        print(f"{setting}: {json.dumps(scores[str(setting)])}", flush=True)
        (out / "towers.json").write_text(json.dumps(log))
    clips = generated(parts, [(text, 12) for text in PROMPTS], Setting.read(a.settings[0]), seed=1)
    write_sheet(clips.cpu().numpy(), out / "sheet.png")
    log["reasoner"] = judge_reasoner(parts, a.judged)
    print(f"reasoner: {json.dumps(log['reasoner'])}", flush=True)
    log["questions"] = judge_questions(parts, max(1, a.judged // 3))
    print(f"questions: {json.dumps(log['questions'])}", flush=True)
    (out / "towers.json").write_text(json.dumps(log))


def save(parts: Parts, out: Path) -> None:
    """The weights in bfloat16, by the first rank."""
    if ranks.rank():
        return
    for name, module in (("transformer", parts.model), ("vision", parts.vision)):
        tensors = {k: v.to(torch.bfloat16).contiguous() for k, v in module.state_dict().items()}
        names, count = sorted(tensors), SHARDS[name]
        for i in range(count):
            shard = {n: tensors[n] for n in names[i::count]}
            save_file(shard, out / f"{name}-{i}.safetensors", {"format": "pt"})


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add: Callable[..., object] = p.add_argument
    add("out")
    add("vae", help="folder with vae.safetensors and vae.json, or a checkpoint")
    add("tokenizer", help="tokenizer.json")
    add("--size", type=int, nargs=3, default=(320, 192, 17), help="width height frames")
    add("--seconds", type=float, default=600)
    add("--steps", type=int, help="at most")
    add("--init", nargs="*", default=[], help="safetensors to start from")
    add("--first", type=int, default=0, help="seed of the first scene")
    add("--pool", type=int, default=98304, help="clips")
    add("--grown", action="store_true", help="all kinds of scenes")
    add("--sound", help="safetensors of the sound autoencoder, for that mode")
    add("--modes", nargs="*", choices=MODES, default=[], help="what else is taught in turns")
    add("--batch", type=int, default=256, help="clips in a step")
    add("--chats", type=int, default=24, help="questions in a step; 0: no reasoner")
    add("--structured-every", type=int, default=12, help="steps between those with JSON captions")
    add("--rate", type=float, default=1.2e-3)
    add("--muon-rate", type=float, default=4e-3, help="0: AdamW for everything")
    add("--hold", type=float, default=0.2, help="share of the run at the full rate")
    add("--warmup", type=int, default=300)
    add("--ema", type=float, default=0.999)
    add("--shift", type=float, default=8.0)
    add("--things", type=float, default=3.0)
    add("--layers", type=int, default=7)
    add("--intermediate", type=int, default=384)
    add("--encoder", type=int, default=8)
    add("--decoder", type=int, default=16)
    add("--judged", type=int, default=768)
    add("--every", type=int, default=1000)
    add("--workers", type=int, default=12 if DEVICE == "cuda" else 1)
    add("--vision-only", action="store_true", help="chats alone, and leave both towers")
    add(
        "--generation-only",
        action="store_true",
        help="leave text tower and vision encoder: a policy and four steps stay valid",
    )
    add(
        "--changed",
        action="store_true",
        help="the generation tower and --modes alone; leaves changed.safetensors",
    )
    add("--compile", action="store_true")
    add("--flexible", action="store_true", help="attention as a Triton kernel")
    add(
        "--settings", nargs="*", help="guidance,steps,shift,given frames",
        default=["3,16,10,0", "6,35,10,0", "3,16,3,0", "3,16,10,1", "6,35,10,1", "1,16,10,0"],
    )  # fmt: skip
    return p.parse_args(argv)


if __name__ == "__main__":
    main()
