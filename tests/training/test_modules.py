"""The modules that are trained compute what the package, diffusers and transformers compute."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoProcessor, Cosmos3OmniForConditionalGeneration

from training.actions import DOMAIN, EMBODIMENT, FPS, VIEW, WIDTH
from training.autoencoder import Autoencoder
from training.export import export
from training.prompts import encoded, framed, framed_action, framed_transfer
from training.questions import Asked
from training.rendering import pack, render
from training.sampling import guided, sample, schedule, unguided
from training.scenes import Canvas, draw_scene
from training.streams import Actions, Sound, Video, flattened, separated
from training.transformer import Shape, Transformer
from training.vision import (
    PATCH,
    ChatFrame,
    VisionEncoder,
    VisionShape,
    hidden_states,
    seen_frames,
)
from vllm_cosmos3 import Cosmos3

BOUND = 1e-5
PICTURE = np.random.RandomState(1).randint(0, 256, (64, 96, 3), dtype=np.uint8)
USED = 16
CANVAS = Canvas(frames=5, width=96, height=64, fps=12)
FULL = Canvas(fps=12)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Modules as they are before training, but with outputs that are not zero."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    model, vision = Transformer(Shape()), VisionEncoder(VisionShape(), FULL)
    adapters = (model.action_proj_in.fc, model.action_proj_out.fc, model.audio_proj_in)
    for part in (model.proj_out, model.audio_proj_out, *adapters):
        torch.nn.init.normal_(part.weight, std=0.05)
    torch.nn.init.normal_(model.action_modality_embed)
    torch.nn.init.normal_(model.audio_modality_embed)
    model.ignore_channels(USED)
    vae = Autoencoder(used=USED)
    for name, module in (("transformer-0", model), ("vision-0", vision), ("vae", vae)):
        tensors = {k: v.to(torch.bfloat16).contiguous() for k, v in module.state_dict().items()}
        save_file(tensors, folder / f"{name}.safetensors")
    std = [0.7] * USED + [1.0] * (48 - USED)
    (folder / "vae.json").write_text(json.dumps({"mean": [0.1] * USED + [0.0] * 32, "std": std}))
    return folder


@pytest.fixture(scope="module")
def checkpoint(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "demo"
    export(folder, [parts])
    return folder


def loaded(module: torch.nn.Module, file: Path) -> torch.nn.Module:
    module.load_state_dict({k: v.float() for k, v in load_file(file).items()})
    return module.eval()


def clips(canvas: Canvas, count: int = 1) -> torch.Tensor:
    scenes = [draw_scene(i, canvas) for i in range(count)]
    return render(pack(scenes), canvas.height, canvas.width)


@torch.no_grad()
def test_autoencoder_is_that_of_diffusers(checkpoint: Path, parts: Path) -> None:
    theirs = AutoencoderKLWan.from_pretrained(checkpoint / "vae").eval()
    mine = loaded(Autoencoder(used=USED), parts / "vae.safetensors")
    pixels = clips(Canvas(frames=9, width=96, height=64))
    posterior = theirs.encode(pixels.permute(0, 4, 1, 2, 3)).latent_dist
    mean, log_var = mine.moments(pixels)
    assert (mean.permute(0, 4, 1, 2, 3) - posterior.mean).abs().max() < BOUND
    assert (log_var.permute(0, 4, 1, 2, 3) - posterior.logvar).abs().max() < BOUND
    noise = torch.randn_like(mean)  # in the channels that nobody uses as well
    decoded = theirs.decode(noise.permute(0, 4, 1, 2, 3)).sample.permute(0, 2, 3, 4, 1)
    assert (mine.pixels(noise).clamp(-1, 1) - decoded).abs().max() < BOUND


@pytest.mark.parametrize("given", [0, 1])
@torch.no_grad()
def test_clips_are_those_of_the_package(checkpoint: Path, parts: Path, given: int) -> None:
    """Prompt, positions, guidance, schedule and solver, up to the last latents."""
    text, steps = "A red square moves to the right.", 4
    shape = (1, 48, 2, CANVAS.height // 16, CANVAS.width // 16)
    noise = np.random.RandomState(5).standard_normal(shape).astype(np.float32)
    frame = ((clips(CANVAS)[0, 0] + 1) * 127.5).round().byte().numpy()
    with Cosmos3(checkpoint, device="cpu", dtype="float32") as package:
        out = package.generate(
            prompt=text, size="96x64", num_frames=5, fps=12, num_inference_steps=steps,
            generate_sound=False, latents={"vision": noise}, output_type="latent",
            **({"image": frame} if given else {}),
        )  # fmt: skip
    model = loaded(Transformer(Shape()), parts / "transformer-0.safetensors")
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    texts = [framed(text, CANVAS), framed("{}", CANVAS, negative=True)]
    ids, lengths = encoded(tokenizer, texts)
    known = torch.zeros(1, 2, dtype=torch.bool)
    x = torch.from_numpy(noise).permute(0, 2, 3, 4, 1)[..., :USED].clone()
    expected = torch.from_numpy(out.latents["vision"]).permute(0, 2, 3, 4, 1)[..., :USED]
    if given:
        vae = loaded(Autoencoder(used=USED), parts / "vae.safetensors")
        pixels = torch.from_numpy(frame).float() / 127.5 - 1
        mean, _ = vae.moments(pixels[None, None])
        x[:, 0], known[:, 0] = (mean[:, 0, ..., :USED] - 0.1) / 0.7, True
        assert (x[:, 0] - expected[:, 0]).abs().max() < 1e-4
    velocity = guided(model, ids, lengths, torch.tensor([12.0]), known, 6.0)
    mine = sample(velocity, x, ~known[:, :, None, None, None], schedule(steps, 10.0))
    assert (mine - expected).abs().max() < 1e-4
    assert (expected - x).abs().max() > 0.1


ROWS = np.random.RandomState(2).standard_normal((4, WIDTH)).astype(np.float32)
CLIP = np.stack([PICTURE] * 5)
SHAPES = {"vision": (1, 48, 2, 4, 6), "action": (4, 64), "sound": (64, 11)}
NOISE = {
    name: np.random.RandomState(3).standard_normal(shape).astype(np.float32)
    for name, shape in SHAPES.items()
}  # as the package draws it for seed 3
ACTED = {"domain_name": EMBODIMENT, "action_chunk_size": 4}
JOINT: dict[str, dict[str, Any]] = {
    "forward_dynamics": {"action": ROWS.tolist(), "image": PICTURE, **ACTED},
    "inverse_dynamics": {"video": CLIP, **ACTED},
    "policy": {"image": PICTURE, **ACTED},
    "transfer": {"seg": CLIP, "fps": 12, "control_guidance": 1.0},
    "sound": {"generate_sound": True, "num_frames": 5, "fps": 12},
}


def streams_of(name: str, seen: torch.Tensor) -> tuple[str, list[Any]]:
    """The prompt and the streams of each of JOINT, as training has them; ``seen`` is CLIP's latents."""
    text, acted = "pick up the red square", name not in ("transfer", "sound")
    canvas = replace(CANVAS, fps=FPS if acted else 12)
    rates = torch.tensor([float(canvas.fps)])
    video = torch.from_numpy(NOISE["vision"]).permute(0, 2, 3, 4, 1)[..., :USED]
    everything, nothing = torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2, dtype=torch.bool)
    if name == "transfer":
        streams = [Video(seen, everything, rates), Video(video, nothing, rates)]
        return framed_transfer(text, "seg", canvas), streams
    if name == "sound":
        sound = torch.from_numpy(NOISE["sound"]).T[None]
        return framed(text, canvas), [Video(video, nothing, rates), Sound(sound)]
    known = everything if name == "inverse_dynamics" else torch.tensor([[True, False]])
    given = torch.full((1, 4), name == "forward_dynamics")
    rows = torch.from_numpy(NOISE["action"]).clone()
    rows[:, WIDTH:] = 0
    if name == "forward_dynamics":
        rows[:, :WIDTH] = torch.from_numpy(ROWS)
    video = torch.where(known[:, :, None, None, None], seen, video)
    actions = Actions(rows[None], given, rates, DOMAIN, WIDTH)
    described = framed_action(f"{text}.", VIEW, canvas)
    return described, [Video(video, known, rates), actions]


@pytest.mark.parametrize("name", JOINT)
@torch.no_grad()
def test_streams_lie_in_the_sequence_as_the_packages(
    checkpoint: Path, parts: Path, name: str
) -> None:
    """Actions, controls and sound beside a video: prompts, positions, masks, adapters, solver."""
    mode = {"action_mode": name} if name not in ("transfer", "sound") else {}
    with Cosmos3(checkpoint, device="cpu", dtype="float32") as package:
        out = package.generate(
            prompt="pick up the red square", size="96x64", num_inference_steps=3, seed=3,
            guidance_scale=1.0, flow_shift=10.0, output_type="latent", **mode, **JOINT[name],
        )  # fmt: skip
    model = loaded(Transformer(Shape()), parts / "transformer-0.safetensors")
    vae = loaded(Autoencoder(used=USED), parts / "vae.safetensors")
    pixels = torch.from_numpy(CLIP).float()[None] / 127.5 - 1
    prompt, streams = streams_of(name, (vae.moments(pixels)[0][..., :USED] - 0.1) / 0.7)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    like = [stream.x for stream in streams]
    free = flattened([stream.free().expand_as(stream.x) for stream in streams])
    velocity = unguided(model, *encoded(tokenizer, [prompt]), streams)
    made = separated(sample(velocity, flattened(like), free, schedule(3, 10.0)), like)
    video = made.pop() if name == "transfer" else made.pop(0)
    expected = torch.from_numpy(out.latents["vision"]).permute(0, 2, 3, 4, 1)[..., :USED]
    assert (video - expected).abs().max() < 1e-4
    for other in {"action", "sound"} & out.latents.keys():
        theirs = torch.from_numpy(out.latents[other])
        mine = made[0][0] if other == "action" else made[0][0].T
        assert (mine - theirs).abs().max() < 1e-4
        assert (theirs - torch.from_numpy(NOISE[other])).abs().max() > 0.1


@torch.no_grad()
def test_chats_are_those_of_transformers(checkpoint: Path, parts: Path) -> None:
    processor = AutoProcessor.from_pretrained(checkpoint)
    theirs = Cosmos3OmniForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    pixels = clips(FULL)
    frames = ((pixels[0] + 1) * 127.5).round().byte()
    metadata = {"total_num_frames": 17, "fps": 12.0, "duration": 17 / 12}
    content = [{"type": "video"}, {"type": "text", "text": "What do you see?"}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    batch = processor(
        text=[prompt], videos=[list(frames.numpy())], video_metadata=[metadata],
        do_sample_frames=True, return_tensors="pt",
    )  # fmt: skip
    expected = theirs.eval()(**batch).logits[0]

    model = loaded(Transformer(Shape()), parts / "transformer-0.safetensors")
    vision = loaded(VisionEncoder(VisionShape(), FULL), parts / "vision-0.safetensors")
    frame = ChatFrame(Tokenizer.from_file(str(checkpoint / "tokenizer.json")), FULL)
    chats = frame.pack([Asked("What do you see?", "A circle.")], [12])
    length = int(chats.starts[0])
    assert chats.ids[0, :length].tolist() == batch["input_ids"][0].tolist()
    seen = (frames.float() / 127.5 - 1)[list(seen_frames(17))].unsqueeze(0)
    hidden = hidden_states(model, vision, seen, chats.ids, chats.slot, chats.places)
    assert (model.lm_head(hidden)[0, :length] - expected).abs().max() < BOUND
    assert seen.shape[2:4] == (12 * PATCH, 20 * PATCH)
