"""The Wan 2.2 video autoencoder: 4 frames x 16 x 16 pixels to one latent position of 48 channels.

Time is causal, so a clip goes through in chunks: the first frame alone, then one or several latent
frames (four pixel frames each) at a time, as `chunk_sizes` says, and the result does not depend on the
chunks. What the convolutions have to remember from chunk to chunk is in a `CausalCache` that belongs
to one clip. Space is divided by `parallel.plane`: every rank computes its parts of the plane and the
parts are summed.

Module names are those of the checkpoint. Shape suffixes: B batch, C channels, T frames, H height,
W width, S positions; small letters where the axis is divided.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_cosmos3.checkpoint.config import VAEConfig
from vllm_cosmos3.checkpoint.latents import chunk_sizes, latent_frames
from vllm_cosmos3.parallel.axis import Axis
from vllm_cosmos3.parallel.halo import (
    Fill,
    add_to,
    gather_strips,
    memory_format,
    sum_over,
    surround,
    take_strip,
)
from vllm_cosmos3.parallel.plane import Strips, divide


class VideoVAE(nn.Module):
    """Pixels to normalised latents and back, divided over ``world`` as ``parallel`` says.

    ``parallel`` is one of `parallel.plane.VAE_PARALLEL`. All ranks call together with the same arguments and
    get the same result.
    """

    def __init__(self, config: VAEConfig, world: Axis, parallel: str) -> None:
        super().__init__()
        self.config, self.world, self.parallel = config, world, parallel
        z = config.z_dim
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv3d(2 * z, 2 * z, 1)
        self.post_quant_conv = nn.Conv3d(z, z, 1)
        self.decoder = Decoder(config)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Posterior mean of ``pixels`` [1, 3, 4k + 1, H, W] in [-1, 1]: float32 [1, 48, k + 1, h, w].

        Normalised as the transformer wants it. H and W are multiples of 16. Latent frame j depends
        on the pixel frames up to 4j alone, so give the prefix that is needed.
        """
        config = self.config
        scale = config.scale_factor_spatial
        frames = latent_frames(pixels.shape[2], config)
        height, width = pixels.shape[3] // scale, pixels.shape[4] // scale
        _, *later = chunk_sizes(frames, height, width)
        sizes = [1] + [config.scale_factor_temporal * size for size in later]
        canvas = pixels.new_zeros((1, config.z_dim, frames, height, width), dtype=torch.float32)
        for part in divide(height, width, self.world, self.parallel):
            cache = CausalCache(part.strips)
            own = space_to_depth(
                part.cut(pixels, scale).to(self.quant_conv.weight.dtype), config.patch_size
            )
            moments = [self.encoder(chunk, cache) for chunk in own.split(sizes, dim=2)]
            mean, _ = self.quant_conv(torch.cat(moments, dim=2)).chunk(2, dim=1)
            add_to(canvas, part, mean)
        mean, std = self._statistics(pixels.device)
        return (sum_over(canvas, self.world) - mean) / std

    @torch.no_grad()
    def decode(self, latents: Tensor, clip: DecodedClip | None = None) -> Iterator[Tensor]:
        """Pixels of normalised ``latents`` [1, 48, T, h, w] in [-1, 1]: one frame, then chunk by chunk.

        Each chunk is float32 [1, 3, 1 or 4 k, 16 h, 16 w] for k latent frames, see `chunk_sizes`.
        Several ranks must all exhaust the iterator, since they send each other borders while they
        compute. With a ``clip`` these latents are the next ones of it, and it remembers them.
        """
        config = self.config
        scale = config.scale_factor_spatial
        height, width = latents.shape[3], latents.shape[4]
        mean, std = self._statistics(latents.device)
        z = (latents.float() * std + mean).to(self.quant_conv.weight.dtype)
        parts = divide(height, width, self.world, self.parallel)
        clip = self.begin_clip(height, width) if clip is None else clip
        sizes = chunk_sizes(latents.shape[2], height, width, begun=clip.frames > 0)
        for chunk in z.split(sizes, dim=2):
            frames = config.scale_factor_temporal * chunk.shape[2] if clip.frames else 1
            shape = (1, 3, frames, height * scale, width * scale)
            canvas = chunk.new_zeros(shape, dtype=torch.float32)
            for part, cache in zip(parts, clip.caches, strict=True):
                own = self.decoder(self.post_quant_conv(part.cut(chunk)), cache)
                add_to(canvas, part, depth_to_space(own, config.patch_size), scale)
            clip.frames += chunk.shape[2]
            yield sum_over(canvas, self.world).clamp_(-1, 1)

    def begin_clip(self, height: int, width: int) -> DecodedClip:
        """A clip of which nothing is decoded, with so many rows and columns of latents."""
        parts = divide(height, width, self.world, self.parallel)
        return DecodedClip(caches=[CausalCache(part.strips) for part in parts])

    def channels_last(self) -> VideoVAE:
        """Lay all weights out with channels innermost, as tensor cores want; cuDNN's outputs follow."""
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        for parameter in self.parameters():
            if parameter.dim() in formats:
                parameter.data = parameter.contiguous(memory_format=formats[parameter.dim()])
        return self

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, float32 whatever the weights are."""
        values = self.config.latents_mean, self.config.latents_std
        mean, std = torch.tensor(values, dtype=torch.float32, device=device).view(2, 1, -1, 1, 1, 1)
        return mean, std


def to_pixels(frames_THWC: Tensor) -> Tensor:
    """uint8 [T, H, W, 3] to float32 [1, 3, T, H, W] in [-1, 1]."""
    return frames_THWC.movedim(3, 0)[None].float() / 127.5 - 1


def to_frames(pixels_BCTHW: Tensor) -> Tensor:
    """Inverse of `to_pixels`, to the nearest level, on the device of ``pixels``."""
    levels = (pixels_BCTHW[0] + 1) * 127.5
    return levels.round().clamp(0, 255).to(torch.uint8).movedim(0, 3).contiguous()


class CausalCache:
    """The causal cache of one clip: what its convolutions need beside the present chunk of a strip."""

    def __init__(self, strips: Strips) -> None:
        self.strips = strips
        self.first = True  # the chunk of the single first frame
        self._past: dict[nn.Module, Tensor] = {}

    def copy(self) -> CausalCache:
        """Another one that goes on from here; what both remember is there once."""
        other = CausalCache(self.strips)
        other.first, other._past = self.first, dict(self._past)
        return other

    def extend(
        self, conv: nn.Module, x: Tensor, frames: int, rows: int, through: Fill = Tensor.copy_
    ) -> Tensor:
        """What ``through`` makes of ``x``, with the ``frames`` that ``conv`` saw last in front.

        They are zero in the beginning. And with ``rows`` on both sides where a plane is divided.
        """
        extended = surround(self.strips, x, rows, rows, frames, self._past.get(conv), through)
        self._past[conv] = extended[:, :, -frames:].clone()  # a view would keep all of it alive
        return extended


@dataclass(slots=True, eq=False)
class DecodedClip:
    """What is remembered of a clip that is decoded in several calls, with a cache for each part."""

    caches: list[CausalCache]
    frames: int = 0  # latent ones, so far

    def copy(self) -> DecodedClip:
        """Another one that goes on from here; what both remember is there once."""
        return DecodedClip([cache.copy() for cache in self.caches], self.frames)


class Encoder(nn.Module):
    """Patchified pixels of one chunk to mean and log variance of its latent frames."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.base_dim * factor for factor in (1, *config.dim_mult)]
        halves_time = (*config.temporal_downsample, False)
        last = len(config.dim_mult) - 1
        self.conv_in = CausalConv3d(config.in_channels, widths[0], (3, 3, 3))
        self.down_blocks = nn.ModuleList(
            VideoDownBlock(
                before,
                after,
                config.num_res_blocks,
                time=2 if halves_time[i] else 1,
                space=2 if i < last else 1,
            )
            for i, (before, after) in enumerate(pairwise(widths))
        )
        self.mid_block = MidBlock(widths[-1])
        self.norm_out = NormSiLU(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 2 * config.z_dim, (3, 3, 3))

    def forward(self, x: Tensor, cache: CausalCache) -> Tensor:
        x = self.conv_in(x, cache)
        for block in self.down_blocks:
            x = block(x, cache)
        x = self.mid_block(x, cache)
        x = self.conv_out(x, cache, through=self.norm_out)
        cache.first = False
        return x


class Decoder(nn.Module):
    """The latent frames of one chunk to its patchified pixels."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        mults = config.dim_mult[::-1]
        widths = [config.decoder_base_dim * factor for factor in (mults[0], *mults)]
        doubles_time = (*config.temporal_downsample[::-1], False)
        last = len(mults) - 1
        self.conv_in = CausalConv3d(config.z_dim, widths[0], (3, 3, 3))
        self.mid_block = MidBlock(widths[0])
        self.up_blocks = nn.ModuleList(
            VideoUpBlock(
                before,
                after,
                config.num_res_blocks + 1,
                time=2 if doubles_time[i] else 1,
                space=2 if i < last else 1,
            )
            for i, (before, after) in enumerate(pairwise(widths))
        )
        self.norm_out = NormSiLU(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], config.out_channels, (3, 3, 3))

    def forward(self, x: Tensor, cache: CausalCache) -> Tensor:
        x = self.mid_block(self.conv_in(x, cache), cache)
        for block in self.up_blocks:
            x = block(x, cache)
        x = self.conv_out(x, cache, through=self.norm_out)
        cache.first = False
        return x


class VideoDownBlock(nn.Module):
    """Residual blocks, then fewer positions; the shortcut averages. ``time`` and ``space`` are factors."""

    def __init__(self, before: int, after: int, depth: int, *, time: int, space: int) -> None:
        super().__init__()
        self.channels, self.time, self.space = after, time, space
        self.resnets = residual_blocks(before, after, depth)
        self.downsampler = Downsampler(after, time) if space > 1 else None

    def forward(self, x: Tensor, cache: CausalCache) -> Tensor:
        shortcut = average_down(x, self.channels, self.time, self.space)
        for resnet in self.resnets:
            x = resnet(x, cache)
        if self.downsampler is not None:
            x = self.downsampler(x, cache)
        return x + shortcut


class VideoUpBlock(nn.Module):
    """Residual blocks, then more positions; the shortcut repeats. The last block is without either."""

    def __init__(self, before: int, after: int, depth: int, *, time: int, space: int) -> None:
        super().__init__()
        self.resnets = residual_blocks(before, after, depth)
        self.upsampler = Upsampler(after, time) if space > 1 else None

    def forward(self, x: Tensor, cache: CausalCache) -> Tensor:
        shortcut = x
        for resnet in self.resnets:
            x = resnet(x, cache)
        if self.upsampler is None:
            return x
        return self.upsampler(x, shortcut, cache)


class Downsampler(nn.Module):
    """Half the rows and columns, and half the frames where ``time`` is 2."""

    def __init__(self, channels: int, time: int) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels, 3, stride=2)})
        self.time_conv = (
            CausalConv3d(channels, channels, (3, 1, 1), stride=time) if time > 1 else None
        )

    def forward(self, x: Tensor, cache: CausalCache) -> Tensor:
        # One row and column of zeros at the right and bottom border only.
        bottom, right = cache.strips.padding(1)
        x = F.pad(surround(cache.strips, x, 0, 1), (0, right, 0, bottom))
        conv = self.resample["1"]
        x = each_frame(x, conv.weight, conv.bias, stride=2)
        if self.time_conv is None:
            return x
        if cache.first:  # alone in its latent frame: nothing to halve, but remembered
            cache.extend(self.time_conv, x, frames=1, rows=0)
            return x
        return self.time_conv(x, cache)


class Upsampler(nn.Module):
    """Twice the rows and columns, and twice the frames where ``time`` is 2, plus a repeated shortcut.

    A row of the doubled image is there twice, so a 3 x 3 kernel on it is a 2 x 2 kernel on the small
    image, another one for each corner of a doubled position: 4/9 of the products. Not on a CPU: torch's
    2 x 2 convolution rounds by the width there, and pixels would differ from those of one rank.
    """

    def __init__(self, channels: int, time: int) -> None:
        super().__init__()
        self.time = time
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels, 3)})
        self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1)) if time > 1 else None

    def forward(self, x: Tensor, shortcut: Tensor, cache: CausalCache) -> Tensor:
        strips, conv = cache.strips, self.resample["1"]
        if self.time_conv is not None and not cache.first:
            # The first frame is not in this convolution's past either: its past begins with zeros.
            x = halves_as_frames(self.time_conv(x, cache))
        if x.is_cpu:
            x = each_frame(doubled(x, strips), conv.weight, padding=strips.padding(1))
            return add_repeated(x, shortcut, conv.bias, self.time)
        if strips.added(1):
            x = surround(strips, x, 1, 1)
        x = each_frame(x, corner_kernels(conv.weight), padding=strips.padding(1))
        return join_corners(x, shortcut, conv.bias, self.time)


class MidBlock(nn.Module):
    """At the coarsest resolution: a residual block, attention within each frame, a residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(channels, channels) for _ in range(2))
        self.attentions = nn.ModuleList([FrameAttention(channels)])

    def forward(self, x: Tensor, cache: CausalCache) -> Tensor:
        x = self.resnets[0](x, cache)
        x = self.attentions[0](x, cache.strips)
        return self.resnets[1](x, cache)


class ResidualBlock(nn.Module):
    """Two causal convolutions with a shortcut."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.norm1 = NormSiLU(before)
        self.conv1 = CausalConv3d(before, after, (3, 3, 3))
        self.norm2 = NormSiLU(after)
        self.conv2 = CausalConv3d(after, after, (3, 3, 3))
        self.conv_shortcut = nn.Conv3d(before, after, 1) if before != after else None

    def forward(self, x: Tensor, cache: CausalCache) -> Tensor:
        """Biases are added in passes that are made anyway: each would be one of its own on a GPU."""
        shortcut, bias = x, self.conv2.bias
        if self.conv_shortcut is not None:
            shortcut = F.conv3d(x, self.conv_shortcut.weight)
            bias = bias + self.conv_shortcut.bias
        x = self.conv1(x, cache, through=self.norm1, biased=False)
        x = self.conv2(x, cache, through=self._second_norm, biased=False)
        return sum_with_bias(x, shortcut, bias)

    def _second_norm(self, out: Tensor, x: Tensor) -> None:
        self.norm2(out, x, self.conv1.bias)


class FrameAttention(nn.Module):
    """Residual attention of one head among the positions of a frame, of all strips together.

    On a CPU every rank computes the whole frame: torch's kernel rounds by how many queries there
    are, and pixels would differ from those of one rank.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = Norm(channels)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCThw: Tensor, strips: Strips) -> Tensor:
        channels, frames = x_BCThw.shape[1:3]
        qkv_TChw = self.to_qkv(self.norm(x_BCThw.transpose(1, 2).flatten(0, 1)))
        q_TChw, kv_TChw = qkv_TChw.split([channels, 2 * channels], dim=1)
        if q_TChw.is_cpu:
            q_TChw = gather_strips(strips, q_TChw)
        kv_TCHW = gather_strips(strips, kv_TChw)
        q_TSC, k_TSC, v_TSC = (
            x.flatten(2).transpose(1, 2) for x in (q_TChw, *kv_TCHW.chunk(2, dim=1))
        )
        # One head: the batch of frames takes the place of the heads.
        out_TSC = F.scaled_dot_product_attention(q_TSC[None], k_TSC[None], v_TSC[None])[0]
        out_TChw = out_TSC.transpose(1, 2).unflatten(2, q_TChw.shape[2:])
        if q_TChw.is_cpu:
            out_TChw = take_strip(strips, out_TChw)
        return x_BCThw + self.proj(out_TChw).unflatten(0, (-1, frames)).transpose(1, 2)


class CausalConv3d(nn.Conv3d):
    """A convolution over earlier frames and surrounding pixels, never later frames."""

    def __init__(
        self, before: int, after: int, kernel: tuple[int, int, int], stride: int = 1
    ) -> None:
        super().__init__(before, after, kernel, stride=(stride, 1, 1))

    def forward(
        self, x: Tensor, cache: CausalCache, *, through: Fill = Tensor.copy_, biased: bool = True
    ) -> Tensor:
        """Of what ``through`` makes of ``x``; not ``biased`` where the caller adds ``bias``."""
        rows, frames = self.kernel_size[1] // 2, self.kernel_size[0] - self.stride[0]
        x = cache.extend(self, x, frames, rows, through)
        padding = (0, *cache.strips.padding(rows))
        return F.conv3d(x, self.weight, self.bias if biased else None, self.stride, padding)


class NormSiLU(nn.Module):
    """RMS norm over the channels of each position, then SiLU: one pass on a GPU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1, 1))

    def forward(self, out: Tensor, x: Tensor, bias: Tensor | None = None) -> None:
        """Written into ``out``. Of ``x + bias``, where the convolution before has left its bias out."""
        if on_gpu(x, out):
            from vllm_cosmos3.generator.models.kernels import norm_silu

            norm_silu(out, x, bias, self.gamma)
            return
        x = x if bias is None else x + bias.view(-1, 1, 1, 1)
        out.copy_(F.silu(rms_normalised(x, self.gamma)))


class Norm(nn.Module):
    """RMS norm over the channels of each position of an image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return rms_normalised(x, self.gamma)


def rms_normalised(x: Tensor, gamma: Tensor) -> Tensor:
    """``x`` scaled to root mean square ``gamma`` over dimension 1, in float32."""
    return F.normalize(x.float(), dim=1).to(x.dtype) * (x.shape[1] ** 0.5 * gamma)


def sum_with_bias(x: Tensor, shortcut: Tensor, bias: Tensor) -> Tensor:
    """``x + shortcut + bias`` in the memory of ``x``: one pass on a GPU."""
    if on_gpu(x, shortcut):
        from vllm_cosmos3.generator.models.kernels import add_with_bias

        return add_with_bias(x, shortcut, bias)
    return x.add_(shortcut).add_(bias.view(-1, 1, 1, 1))


def on_gpu(x: Tensor, other: Tensor) -> bool:
    """Whether our kernels can take this: on CUDA, channels innermost, ``x`` without gaps."""
    without_gaps = x.is_contiguous(memory_format=torch.channels_last_3d)
    return bool(x.is_cuda and without_gaps and other.stride(1) == 1)


def residual_blocks(before: int, after: int, depth: int) -> nn.ModuleList:
    widths = [before] + [after] * depth
    return nn.ModuleList(ResidualBlock(*pair) for pair in pairwise(widths))


def each_frame(
    x_BCTHW: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: tuple[int, int] = (0, 0),
) -> Tensor:
    """A two-dimensional convolution of every frame."""
    x = F.conv2d(x_BCTHW.transpose(1, 2).flatten(0, 1), weight, bias, stride, padding)
    return x.unflatten(0, (-1, x_BCTHW.shape[2])).transpose(1, 2)


def average_down(x: Tensor, channels: int, time: int, space: int) -> Tensor:
    """Blocks of ``time`` x ``space`` x ``space`` into channels, which are averaged down to ``channels``.

    A chunk too short for whole blocks, the first frame, gets zero frames in front.
    """
    x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % time, 0))
    x = x.unflatten(4, (-1, space)).unflatten(3, (-1, space)).unflatten(2, (-1, time))
    x = x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)
    return x.unflatten(1, (channels, -1)).mean(dim=2)


def halves_as_frames(x: Tensor) -> Tensor:
    """Both halves of the channels of a frame as two frames, where channels stay as they lie."""
    shape = x.shape[0], x.shape[1] // 2, 2 * x.shape[2], *x.shape[3:]
    frames = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    frames.unflatten(2, (-1, 2)).copy_(x.unflatten(1, (2, -1)).movedim(1, 3))
    return frames


def doubled(x: Tensor, strips: Strips) -> Tensor:
    """Every row and column of ``x`` twice, with a row of the neighbouring strips on both sides."""
    images = F.interpolate(x.transpose(1, 2).flatten(0, 1), scale_factor=2, mode="nearest")
    x = images.unflatten(0, (-1, x.shape[2])).transpose(1, 2)
    return surround(strips, x, 1, 1) if strips.added(1) else x


def corner_kernels(weight: Tensor) -> Tensor:
    """[4 C', C, 2, 2] of a kernel [C', C, 3, 3] on a doubled image: upper left, upper right and so on.

    In an upper corner the last two rows of the kernel meet the same row, in a lower one the first
    two; and so with columns. Sums are rounded once.
    """
    first, middle, last = torch.eye(3, dtype=weight.dtype, device=weight.device)
    taps = torch.stack([first, middle + last, first + middle, last]).view(2, 2, 3)
    taps = torch.einsum("arh,bsw->abrshw", taps, taps).view(16, 9)
    kernels = taps @ weight.permute(0, 2, 3, 1).flatten(1, 2)  # C', corners and their taps, C
    kernels = kernels.unflatten(1, (4, 4)).transpose(0, 1).flatten(0, 1)
    return kernels.unflatten(1, (2, 2)).permute(0, 3, 1, 2)


def join_corners(corners: Tensor, shortcut: Tensor, bias: Tensor, time: int) -> Tensor:
    """The four corners of each position as one image of twice the size, and `add_repeated`.

    ``corners`` [B, 4 C, T, H + 1, W + 1] is what `corner_kernels` make: lower and right ones lie
    one row and column further. One pass on a GPU.
    """
    if on_gpu(corners, shortcut):
        from vllm_cosmos3.generator.models import kernels

        return kernels.join_corners(corners, shortcut, bias, time)
    height, width = shortcut.shape[3:]
    shape = shortcut.shape[0], corners.shape[1] // 4, corners.shape[2], 2 * height, 2 * width
    layout = memory_format(shortcut)
    x = torch.empty(shape, dtype=shortcut.dtype, device=shortcut.device, memory_format=layout)
    for index, corner in enumerate(corners.chunk(4, dim=1)):
        a, b = divmod(index, 2)
        x[..., a::2, b::2] = corner[..., a : a + height, b : b + width]
    return add_repeated(x, shortcut, bias, time)


def add_repeated(x: Tensor, shortcut: Tensor, bias: Tensor, time: int) -> Tensor:
    """``x + bias`` plus ``shortcut``, whose channels are repeated to fill ``time`` x 2 x 2 blocks.

    Block positions count as channels, the last one fastest, and consecutive ones share a channel of
    ``shortcut``. So each channel covers whole trailing dimensions of a block, and adding in place with
    broadcasting needs no repeated copy. A first frame, which is not doubled, takes a block's last.
    """
    shares = shortcut.shape[1] // x.shape[1]  # channels of shortcut for one of x, a power of two
    frames = x.shape[2] // shortcut.shape[2]
    a = min(shares, time)
    b = min(shares // a, 2)
    # The bias is added where there are fewer positions.
    shortcut = shortcut + bias.repeat_interleave(shares).view(-1, 1, 1, 1)
    shortcut = shortcut.unflatten(1, (x.shape[1], a, b, shares // (a * b)))[:, :, -min(a, frames) :]
    blocks = x.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).unflatten(2, (-1, frames))
    blocks += shortcut.permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x


def space_to_depth(x: Tensor, patch: int) -> Tensor:
    """Squares of pixels into channels, ordered colour, column, row (the transformer's is another)."""
    x = x.unflatten(4, (-1, patch)).unflatten(3, (-1, patch))
    return x.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def depth_to_space(x: Tensor, patch: int) -> Tensor:
    """Inverse of `space_to_depth`."""
    x = x.unflatten(1, (-1, patch, patch))
    return x.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)
