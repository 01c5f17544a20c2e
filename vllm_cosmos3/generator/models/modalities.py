"""Modalities of the generation tower, a row each: how latents become tokens, and what comes of them.

All that is computed of a stream of latents stands in `MODALITIES`, and what a checkpoint has of it in
`stored_modalities`; the planner says which streams a request has, and `checkpoint.latents` where an axis of
time is not the first.

Shapes: C channels, T positions in time, h x w latent pixels, S tokens, D values of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from vllm_cosmos3.checkpoint.config import ModelConfig, TransformerConfig
from vllm_cosmos3.checkpoint.latents import patch_grid
from vllm_cosmos3.generator.models.sound import SoundVAE
from vllm_cosmos3.generator.models.stored_modalities import sound_of, trained_modalities
from vllm_cosmos3.generator.sampling import positions
from vllm_cosmos3.generator.sampling.packing import Stream, patchify, unpatchify
from vllm_cosmos3.request.plan import Plan, StreamPlan

Positions = Callable[[StreamPlan, float, TransformerConfig], Tensor]
Domain: TypeAlias = int | Tensor  # the embodiment of all action rows, or of each [T]


class VisionAdapter(nn.Module):
    """Video latents: a token for each patch."""

    def __init__(self, config: TransformerConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self._patch = config.latent_patch_size
        self.proj_in = nn.Linear(config.patch_latent_dim, config.hidden_size, dtype=dtype)
        self.proj_out = nn.Linear(config.hidden_size, config.patch_latent_dim, dtype=dtype)

    def embed(self, x: Tensor, _domain_id: Domain) -> Tensor:
        return self.proj_in(patchify(x, self._patch))

    def velocity(self, x_SD: Tensor, shape: tuple[int, ...], _domain_id: Domain) -> Tensor:
        return unpatchify(self.proj_out(x_SD), shape, self._patch)


class SoundAdapter(nn.Module):
    """Sound latents [C, T]: a token for each moment."""

    def __init__(self, config: TransformerConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.proj_in = nn.Linear(config.sound_dim, config.hidden_size, dtype=dtype)
        self.proj_out = nn.Linear(config.hidden_size, config.sound_dim, dtype=dtype)
        self.modality = nn.Parameter(torch.empty(config.hidden_size, dtype=dtype))

    def embed(self, x: Tensor, _domain_id: Domain) -> Tensor:
        return self.proj_in(x.T) + self.modality

    def velocity(self, x_SD: Tensor, _shape: tuple[int, ...], _domain_id: Domain) -> Tensor:
        return self.proj_out(x_SD).T


class ActionAdapter(nn.Module):
    """Action rows [T, C]: a token for each, through the matrices of the embodiment.

    The matrices are stored [in, out], row-major, one row of the parameter for each embodiment.
    """

    def __init__(self, config: TransformerConfig, dtype: torch.dtype) -> None:
        super().__init__()
        domains, size, width = (
            config.num_embodiment_domains,
            config.action_dim,
            config.hidden_size,
        )
        self.weight_in = nn.Parameter(torch.empty(domains, size * width, dtype=dtype))
        self.bias_in = nn.Parameter(torch.empty(domains, width, dtype=dtype))
        self.weight_out = nn.Parameter(torch.empty(domains, width * size, dtype=dtype))
        self.bias_out = nn.Parameter(torch.empty(domains, size, dtype=dtype))
        self.modality = nn.Parameter(torch.empty(width, dtype=dtype))

    def embed(self, x: Tensor, domain_id: Domain) -> Tensor:
        return _by_domain(x, self.weight_in, self.bias_in, domain_id) + self.modality

    def velocity(self, x_SD: Tensor, _shape: tuple[int, ...], domain_id: Domain) -> Tensor:
        return _by_domain(x_SD, self.weight_out, self.bias_out, domain_id)


def _by_domain(x: Tensor, weight: Tensor, bias: Tensor, domain_id: Domain) -> Tensor:
    """Rows times the matrix of their embodiment."""
    if isinstance(domain_id, int):
        return torch.addmm(bias[domain_id], x, weight[domain_id].view(x.shape[1], -1))
    matrices = weight[domain_id].unflatten(1, (x.shape[1], -1))
    return torch.baddbmm(bias[domain_id].unsqueeze(1), x.unsqueeze(1), matrices).squeeze(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Modality:
    """One kind of latents.

    ``adapter`` embeds latents as tokens and reads velocities off them. ``positions`` [3, S] are
    those of a stream that starts at a time. ``denoise_mask`` is True where a stream is generated,
    ``conditioned`` [S] which tokens are timestep-conditioned, by that mask, the shape of the latents
    and the size of a patch. Sources of ``given_as_latents`` streams need no encoder. ``coder`` makes the
    autoencoder, into which its tensors are loaded: its ``decode(latents)`` gives float32 values, and its
    ``encode(values)``, where the checkpoint has an encoder, latents. ``read`` makes an output of the latents
    themselves, None where a request wants none.
    """

    adapter: type[nn.Module]
    positions: Positions
    denoise_mask: Callable[[StreamPlan], Tensor]
    conditioned: Callable[[Tensor, tuple[int, ...], int], Tensor]
    given_as_latents: bool = False
    coder: Callable[[ModelConfig], nn.Module] | None = None
    read: Callable[[Plan, Tensor], np.ndarray | None] = lambda _plan, _latents: None


def adapters(config: TransformerConfig, dtype: torch.dtype) -> nn.ModuleDict:
    """The adapters of a checkpoint, by modality."""
    return nn.ModuleDict(
        {name: MODALITIES[name].adapter(config, dtype) for name in trained_modalities(config)}
    )


def make_coder(name: str, model: ModelConfig) -> nn.Module:
    """The autoencoder of a modality whose `LatentCoder` a checkpoint has, without weights."""
    make = MODALITIES[name].coder
    assert make is not None
    return make(model)


def timestep_conditioned(stream: Stream, patch: int) -> Tensor:
    """Bool [S]: tokens of which at least one value is generated; a ``patch`` has so many a side."""
    mask, shape = stream.denoise_mask, tuple(stream.x.shape)
    return MODALITIES[stream.name].conditioned(mask, shape, patch)


def _vision_positions(stream: StreamPlan, start: float, config: TransformerConfig) -> Tensor:
    grid = patch_grid(stream.shape, config.latent_patch_size)
    return positions.vision_positions(*grid, start=start, fps=stream.rate, config=config)


def _sound_positions(stream: StreamPlan, start: float, config: TransformerConfig) -> Tensor:
    return positions.sound_positions(stream.length, start=start, config=config)


def _action_positions(stream: StreamPlan, start: float, config: TransformerConfig) -> Tensor:
    return positions.action_positions(
        stream.length, start=start, fps=stream.rate, first=stream.first_frame, config=config
    )


def frame_mask(frames: int, known: tuple[int, ...]) -> Tensor:
    """Denoise mask [1, 1, frames, 1, 1] of a video of which the latent frames ``known`` are given."""
    mask = torch.ones(frames, dtype=torch.bool)
    mask[list(known)] = False
    return mask.view(1, 1, frames, 1, 1)


def _row_mask(stream: StreamPlan) -> Tensor:
    """Rows [T, C] without those that are given, and without the channels that carry no number."""
    mask = torch.ones(stream.shape, dtype=torch.bool)
    mask[list(stream.known)] = False
    mask[:, stream.channels :] = False
    return mask


def _patch_tokens(mask: Tensor, shape: tuple[int, ...], patch: int) -> Tensor:
    frames, rows, columns = patch_grid(shape, patch)
    return mask.view(frames, 1).expand(frames, rows * columns).flatten()


def _moment_mask(stream: StreamPlan) -> Tensor:
    """Moments [1, T] without those that are given."""
    mask = torch.ones((1, stream.length), dtype=torch.bool)
    mask[:, list(stream.known)] = False
    return mask


def _actions(plan: Plan, latents: Tensor) -> np.ndarray | None:
    return None if plan.actions is None else plan.actions.read(latents.cpu().numpy())


MODALITIES = {  # in the order in which a generator of torch draws their noise
    "vision": Modality(
        adapter=VisionAdapter,
        positions=_vision_positions,
        denoise_mask=lambda stream: frame_mask(stream.length, stream.known),
        conditioned=_patch_tokens,
    ),
    "sound": Modality(
        adapter=SoundAdapter,
        positions=_sound_positions,
        denoise_mask=_moment_mask,
        conditioned=lambda mask, _shape, _patch: mask.any(dim=0),
        coder=lambda model: SoundVAE(sound_of(model), encoder=sound_of(model).encoder_enabled),
    ),
    "action": Modality(
        adapter=ActionAdapter,
        positions=_action_positions,
        denoise_mask=_row_mask,
        conditioned=lambda mask, _shape, _patch: mask.any(dim=1),
        given_as_latents=True,
        read=_actions,
    ),
}
