"""Simulators by an implementation of its own that has no cache: one causal sequence, computed whole.

[text | clean frames | chunk] goes through every layer at once, with a mask that says which frame sees
which. Nothing of the package computes here but the video autoencoder.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rollouts import Case, actions, open_world
from safetensors.torch import load_file
from torch import Tensor

from vllm_cosmos3.generator.world import WorldPipeline

SIGMAS = {"sim-bimanual-camera": (1.0, 0.9375, 5 / 6, 0.625), "sim-bimanual": (1.0, 5 / 6)}
ROWS = 4  # of actions, for each latent frame


class Reference:
    """Both towers, by the names of the files."""

    def __init__(self, folder: Path, ids: tuple[int, ...], fps: float) -> None:
        self.cfg = json.loads((folder / "transformer/config.json").read_text())
        self.w = {
            name: tensor
            for file in (folder / "transformer").glob("*.safetensors")
            for name, tensor in load_file(file).items()
        }
        self.heads, self.kv = self.cfg["num_attention_heads"], self.cfg["num_key_value_heads"]
        self.dim, self.layers = self.cfg["head_dim"], self.cfg["num_hidden_layers"]
        self.fps = fps
        self.origin = len(ids) + 15000.0
        self.text = self._text(torch.tensor(ids))

    def velocity(self, clean: list[dict], chunk: dict, sigma: float, sees: Tensor) -> Tensor:
        """Of the chunk's patches. ``sees`` [frames, frames] of all clean frames, then of the chunk."""
        embed = self.w["time_embedder.linear_1.weight"], self.w["time_embedder.linear_1.bias"]
        out = self.w["time_embedder.linear_2.weight"], self.w["time_embedder.linear_2.bias"]
        tau = np.float32(np.float32(sigma) * np.float32(1000)) * np.float32(0.001)
        angle = tau * torch.exp(torch.arange(128) * (-np.log(10000) / 128))
        time = F.linear(F.silu(F.linear(torch.cat([angle.cos(), angle.sin()]), *embed)), *out)
        blocks = [*clean, chunk]
        x, angles, silent, owner = [], [], [], []
        for block in blocks:
            for frame in range(block["x"].shape[1]):
                own = slice(frame * ROWS, (frame + 1) * ROWS)
                rows, domains = block["rows"][own], block["domains"][own]
                at = block["first"] + frame
                acted = [max(0.0, at + (i + 1) / ROWS - 1) for i in range(ROWS)]
                tokens, height, width = self._patches(block["x"][:, frame])
                token = F.linear(tokens, self.w["proj_in.weight"], self.w["proj_in.bias"])
                x += [self._act(rows, domains), token + time * (block is chunk)]
                places = [(self._time(t), 0, 0) for t in acted]
                places += [(self._time(at), r, c) for r in range(height) for c in range(width)]
                angles.append(self._angles(torch.tensor(places, dtype=torch.float32)))
                silent += [block["silent"]] * ROWS + [False] * len(tokens)
                owner += [block["first"] + frame] * len(places)
        x, angles = torch.cat(x), torch.cat(angles)
        mask = sees[owner][:, owner]
        mask = torch.cat([torch.ones(len(x), len(self.text[0][0]), dtype=torch.bool), mask], dim=1)
        for index in range(self.layers):
            name = f"layers.{index}."
            h = self._norm(x, f"{name}input_layernorm_moe_gen")
            q, k, v = self._heads(h, f"{name}self_attn.", ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k"), angles)  # fmt: skip
            v = v.masked_fill(torch.tensor(silent)[:, None, None], 0.0)
            before_k, before_v = self.text[index]
            seen = self._attend(q, torch.cat([before_k, k]), torch.cat([before_v, v]), mask)
            x = x + seen @ self.w[f"{name}self_attn.to_add_out.weight"].T
            x = x + self._mlp(self._norm(x, f"{name}post_attention_layernorm_moe_gen"), f"{name}mlp_moe_gen.")  # fmt: skip
        x = self._norm(x, "norm_moe_gen")
        x = F.linear(x, self.w["proj_out.weight"], self.w["proj_out.bias"])
        _, frames, high, wide = chunk["x"].shape
        per = ROWS + -(-high // 2) * -(-wide // 2)
        made = [block[ROWS:] for block in x[-frames * per :].split(per)]
        return torch.stack([self._unpatched(each, high, wide) for each in made], dim=1)

    def _text(self, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        x, found = self.w["embed_tokens.weight"][ids], []
        angles = self._angles(torch.arange(len(ids), dtype=torch.float32)[:, None].expand(-1, 3))
        mask = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
        for index in range(self.layers):
            name = f"layers.{index}."
            h = self._norm(x, f"{name}input_layernorm")
            q, k, v = self._heads(h, f"{name}self_attn.", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), angles)  # fmt: skip
            found.append((k, v))
            x = x + self._attend(q, k, v, mask) @ self.w[f"{name}self_attn.to_out.weight"].T
            x = x + self._mlp(self._norm(x, f"{name}post_attention_layernorm"), f"{name}mlp.")
        return found

    def _time(self, frame: float) -> float:
        """Absolute time of a latent frame, in float32 like the positions of the models' framework."""
        rate = np.float32(self.fps / 4)
        return float(np.float32(frame) / rate * np.float32(6.0) + np.float32(self.origin))

    def _angles(self, places: Tensor) -> Tensor:
        axes, limits = [], self.cfg["rope_axes_dim"]
        for i in range(self.dim // 2):
            axes.append(i % 3 if i % 3 and i < 3 * limits[i % 3] else 0)
        steps = torch.arange(0, self.dim, 2, dtype=torch.float32) / self.dim
        return places[:, axes] * (1.0 / self.cfg["rope_theta"] ** steps)

    def _heads(self, x, name, matrices, norms, angles):  # type: ignore[no-untyped-def]
        q, k, v = (x @ self.w[f"{name}{matrix}.weight"].T for matrix in matrices)
        q, k, v = (y.view(len(x), -1, self.dim) for y in (q, k, v))
        q, k = (self._turn(self._norm(y, f"{name}{norm}"), angles) for y, norm in zip((q, k), norms, strict=True))  # fmt: skip
        return q, k, v

    @staticmethod
    def _turn(x: Tensor, angles: Tensor) -> Tensor:
        pairs = torch.view_as_complex(torch.stack(x.chunk(2, dim=-1), dim=-1))
        turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None])
        return torch.cat(turned.unbind(-1), dim=-1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        k, v = (y.repeat_interleave(self.heads // self.kv, dim=1) for y in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / self.dim**0.5
        weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
        return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.w[f"{name}.weight"], 1e-6)

    def _mlp(self, x: Tensor, name: str) -> Tensor:
        gate, up, down = (self.w[f"{name}{n}_proj.weight"].T for n in ("gate", "up", "down"))
        return (F.silu(x @ gate) * (x @ up)) @ down

    def _act(self, rows: Tensor, domains: list[int]) -> Tensor:
        made = [row @ self.w["action_proj_in.fc.weight"][domain].view(64, -1) + self.w["action_proj_in.bias.weight"][domain] for row, domain in zip(rows, domains, strict=True)]  # fmt: skip
        return torch.stack(made) + self.w["action_modality_embed"]

    @staticmethod
    def _patches(x: Tensor) -> tuple[Tensor, int, int]:
        high, wide = -(-x.shape[1] // 2), -(-x.shape[2] // 2)
        x = F.pad(x, (0, 2 * wide - x.shape[2], 0, 2 * high - x.shape[1]))
        tokens = [x[:, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].permute(1, 2, 0).flatten() for r in range(high) for c in range(wide)]  # fmt: skip
        return torch.stack(tokens), high, wide

    @staticmethod
    def _unpatched(tokens: Tensor, high: int, wide: int) -> Tensor:
        rows, columns = -(-high // 2), -(-wide // 2)
        x = torch.zeros(48, 2 * rows, 2 * columns)
        for place, (r, c) in enumerate(itertools.product(range(rows), range(columns))):
            x[:, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2] = (
                tokens[place].view(2, 2, 48).permute(2, 0, 1)
            )
        return x[:, :high, :wide]


def remembered(frames: int, sinks: int, window: int) -> list[int]:
    """Which of so many clean frames have not been forgotten."""
    return [f for f in range(frames) if f < sinks or f >= frames - window]


def reference(pipeline: WorldPipeline, case: Case, first: np.ndarray) -> list[np.ndarray]:
    """The latents of all chunks; frame 0 is the latent of the picture, where there is one."""
    world = open_world(pipeline, case)
    opening, causal = world.opening, world.causal
    model = Reference(pipeline.model.path, opening.token_ids, opening.fps)
    clean: list[dict] = []  # blocks that are committed together: their frames see each other
    made, start = [], 0

    def visible(first: int, count: int) -> Tensor:
        """Of all clean frames and those of the chunk: which see which."""
        groups = [(part["first"], part["x"].shape[1]) for part in clean] + [(first, count)]
        begun = [at for at, length in groups for _ in range(length)]  # of each frame: its group
        kept = [remembered(at, opening.sinks, opening.history) for at in begun]
        frames = range(len(begun))
        return torch.tensor(
            [[begun[g] == begun[f] or g in kept[f] for g in frames] for f in frames]
        )

    for step, rows in enumerate([None, *actions(world, case)]):
        name = None if step == 0 else case.steps[step - 1]
        count = 1 if step == 0 else causal.chunk_size
        names = name if isinstance(name, tuple) else (name or world.space.name,) * (count * ROWS)
        space, domains = causal.spaces[names[0]], [causal.spaces[one].domain_id for one in names]
        width = 64
        padded = torch.zeros(count * ROWS, width)
        if rows is not None:
            values = torch.from_numpy(rows)
            if space.scale is not None:
                values = (values - torch.tensor(space.offset)) / torch.tensor(space.scale)
            padded[:, : rows.shape[1]] = values
        shape = (48, count, *opening.frame[3:])
        seed, sigmas = opening.seed, SIGMAS[case.kind]
        sigmas = sigmas if start == 0 else (1.0, 5 / 6)
        noise = torch.Generator().manual_seed(seed + start)
        x = torch.randn((1, *shape), generator=noise, dtype=torch.bfloat16).float()[0]
        if step == 0 and opening.source is not None:
            x, sigmas = torch.from_numpy(first)[0], ()
        block = {"first": start, "rows": padded, "domains": domains, "silent": rows is None}
        sees = visible(start, count)
        for index, sigma in enumerate(sigmas):
            following = (*sigmas, 0.0)[index + 1]
            velocity = model.velocity(clean, {**block, "x": x}, sigma, sees)
            x = x - np.float32(sigma) * velocity
            if following:
                drawn = torch.Generator().manual_seed(
                    seed + start * 1_000_003 + (index + 1) * 9_176
                )
                x = (1 - np.float32(following)) * x + np.float32(following) * torch.randn((1, *shape), generator=drawn)[0]  # fmt: skip
        made.append(x[None].numpy())
        group = count if case.request.commit == "chunk" else 1
        for at in range(0, count, group):
            own = slice(at * ROWS, (at + group) * ROWS)
            part = {"x": x[:, at : at + group], "rows": padded[own], "domains": domains[own]}
            clean.append({**block, **part, "first": start + at})
        start += count
    return made


def pictures(pipeline: WorldPipeline, latents: list[np.ndarray]) -> np.ndarray:
    """Frames uint8 [T, H, W, 3] of all chunks, decoded as one video."""
    whole = torch.from_numpy(np.concatenate(latents, axis=2))
    decoded = torch.cat(list(pipeline.vae.decode(whole)), dim=2)
    levels = ((decoded[0] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return levels.movedim(0, 3).numpy()
