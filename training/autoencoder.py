"""The Wan 2.2 residual video autoencoder over whole clips at once, for training.

Tensor names and arithmetic are those of `AutoencoderKLWan(is_residual=True)`, which goes through a
clip in chunks of one and then four frames; here all frames go together, which a GPU likes. Layout is
[B, T, H, W, C]. A convolution over three frames is a 2-D one over the channels of three frames.

Only the first ``used`` latent channels carry anything; the tensors of the others are zero. What the
transformer has to denoise is then that much smaller, in an unchanged layout.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LATENTS, MULTIPLES, DOWN_TIME = 48, (1, 2, 4, 4), (False, True, True, False)


def _conv(x: Tensor, conv: nn.Module, weight: Tensor, stride: int = 1, pad: int = 0) -> Tensor:
    images = x.flatten(0, 1).permute(0, 3, 1, 2)
    out = F.conv2d(images, weight, conv.bias, stride, pad).permute(0, 2, 3, 1)
    return out.unflatten(0, x.shape[:2])


def _in_time(x: Tensor) -> Tensor:
    """Each frame with the two before it as further channels, the earliest first."""
    x = F.pad(x, (0, 0, 0, 0, 0, 0, 2, 0))
    return torch.cat([x[:, :-2], x[:, 1:-1], x[:, 2:]], -1)


def _normed(x: Tensor, gamma: Tensor) -> Tensor:
    # Not F.rms_norm: it is very slow on rows of 8 to 64 values.
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    scale = (x.shape[-1] ** 0.5 / length.clamp(min=1e-6)).to(x.dtype)
    return x * scale * gamma.flatten().to(x.dtype)


def _activated(x: Tensor, gamma: Tensor) -> Tensor:
    """Norm, SiLU and the frames before as channels: what a causal convolution takes."""
    return _in_time(F.silu(_normed(x, gamma)))


class CausalConv3d(nn.Conv3d):
    """A convolution that sees the frames before; with a stride in time, three frames every two."""

    def __init__(
        self, before: int, after: int, kernel: tuple[int, int, int], stride: int = 1
    ) -> None:
        super().__init__(before, after, kernel, stride=(stride, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.stride[0] == 2:  # frames (0, 1, 2), (2, 3, 4), ...: no padding
            x = torch.cat([x[:, 0:-2:2], x[:, 1:-1:2], x[:, 2::2]], -1)
        elif self.kernel_size[0] == 3:
            x = _in_time(x)
        return self.joined(x)

    def joined(self, x: Tensor) -> Tensor:
        """The convolution over channels of several frames."""
        weight = self.weight.transpose(1, 2).flatten(1, 2)
        return _conv(x, self, weight, pad=self.kernel_size[1] // 2)


class Norm(nn.Module):
    """RMS norm over channels; ``dims`` is the rank of the stored gamma beyond channels."""

    def __init__(self, channels: int, dims: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * dims))

    def forward(self, x: Tensor) -> Tensor:
        return _normed(x, self.gamma)


class ResidualBlock(nn.Module):
    """Two causal convolutions and a shortcut."""

    activated = staticmethod(_activated)  # replaced by a compiled one where that pays

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = Norm(before), CausalConv3d(before, after, (3, 3, 3))
        self.norm2, self.conv2 = Norm(after), CausalConv3d(after, after, (3, 3, 3))
        self.conv_shortcut = CausalConv3d(before, after, (1, 1, 1)) if before != after else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        x = self.conv1.joined(self.activated(x, self.norm1.gamma))
        return self.conv2.joined(self.activated(x, self.norm2.gamma)) + shortcut


class Attention(nn.Module):
    """Attention of one head over the positions of each frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = Norm(channels, 2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = _conv(self.norm(x), self.to_qkv, self.to_qkv.weight).flatten(2, 3)
        q, k, v = qkv.chunk(3, -1)
        out = F.scaled_dot_product_attention(q, k, v).unflatten(2, x.shape[2:4])
        return x + _conv(out, self.proj, self.proj.weight)


class Middle(nn.Module):
    """Attention between two residual blocks."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(channels, channels) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Resampler(nn.Module):
    """Down or up by two in space, and in time where ``time``."""

    def __init__(self, channels: int, *, time: bool, down: bool) -> None:
        super().__init__()
        self.down = down
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels, 3, 2 if down else 1)})
        self.time_conv = None
        if time:
            after, stride = (channels, 2) if down else (2 * channels, 1)
            self.time_conv = CausalConv3d(channels, after, (3, 1, 1), stride)

    def forward(self, x: Tensor) -> Tensor:
        conv = self.resample["1"]
        if self.down:
            x = _conv(F.pad(x, (0, 0, 0, 1, 0, 1)), conv, conv.weight, 2)
            if self.time_conv is None or x.shape[1] == 1:
                return x
            return torch.cat([x[:, :1], self.time_conv(x)], 1)
        if self.time_conv is not None and x.shape[1] > 1:
            later = self.time_conv(x[:, 1:]).unflatten(-1, (2, -1)).movedim(4, 2).flatten(1, 2)
            x = torch.cat([x[:, :1], later], 1)
        x = x[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2, -1).flatten(4, 5).flatten(2, 3)
        return _conv(x, conv, conv.weight, pad=1)


class Stage(nn.Module):
    """Residual blocks and a resampler, beside a path without weights that averages or repeats."""

    def __init__(
        self, before: int, after: int, depth: int, *, time: bool, down: bool, last: bool
    ) -> None:
        super().__init__()
        self.after, self.time, self.space = after, 2 if time else 1, 1 if last else 2
        widths = [before] + [after] * depth
        self.resnets = nn.ModuleList(ResidualBlock(*pair) for pair in pairwise(widths))
        resampler = None if last else Resampler(after, time=time, down=down)
        self.down = down
        self.downsampler, self.upsampler = (resampler, None) if down else (None, resampler)

    def forward(self, x: Tensor) -> Tensor:
        start = x
        for resnet in self.resnets:
            x = resnet(x)
        if self.down:
            x = x if self.downsampler is None else self.downsampler(x)
            return x + self._averaged(start)
        return x if self.upsampler is None else self.upsampler(x) + self._repeated(start)

    def _averaged(self, x: Tensor) -> Tensor:
        t, s = self.time, self.space
        x = F.pad(x, (0, 0, 0, 0, 0, 0, t - 1, 0))
        x = x.unflatten(3, (-1, s)).unflatten(2, (-1, s)).unflatten(1, (-1, t))
        x = x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(4)
        return x.unflatten(4, (self.after, -1)).mean(-1)

    def _repeated(self, x: Tensor) -> Tensor:
        t, s = self.time, self.space
        repeats = self.after * t * s * s // x.shape[-1]
        x = x.unsqueeze(-1).expand(*x.shape, repeats).flatten(-2)
        x = x.unflatten(-1, (self.after, t, s, s)).permute(0, 1, 5, 2, 6, 3, 7, 4)
        return x.flatten(5, 6).flatten(3, 4).flatten(1, 2)[:, t - 1 :]


class Encoder(nn.Module):
    """Pixels, two by two as channels, to the moments of the posterior."""

    def __init__(self, base: int) -> None:
        super().__init__()
        widths = [base * m for m in (1, *MULTIPLES)]
        self.conv_in = CausalConv3d(12, widths[0], (3, 3, 3))
        self.down_blocks = nn.ModuleList(
            Stage(a, b, 2, time=DOWN_TIME[i], down=True, last=i == 3)
            for i, (a, b) in enumerate(pairwise(widths))
        )
        self.mid_block, self.norm_out = Middle(widths[-1]), Norm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 2 * LATENTS, (3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latents to pixels, two by two as channels."""

    def __init__(self, base: int) -> None:
        super().__init__()
        widths = [base * m for m in (MULTIPLES[-1], *MULTIPLES[::-1])]
        times = (*DOWN_TIME[:3][::-1], False)
        self.conv_in = CausalConv3d(LATENTS, widths[0], (3, 3, 3))
        self.mid_block = Middle(widths[0])
        self.up_blocks = nn.ModuleList(
            Stage(a, b, 3, time=times[i], down=False, last=i == 3)
            for i, (a, b) in enumerate(pairwise(widths))
        )
        self.norm_out = Norm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 12, (3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Autoencoder(nn.Module):
    """Both halves. ``used`` is how many of the 48 latent channels carry anything."""

    def __init__(self, encoder: int = 8, decoder: int = 16, used: int = LATENTS) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(encoder), Decoder(decoder)
        self.quant_conv = CausalConv3d(2 * LATENTS, 2 * LATENTS, (1, 1, 1))
        self.post_quant_conv = CausalConv3d(LATENTS, LATENTS, (1, 1, 1))
        mask = torch.zeros(LATENTS)
        mask[:used] = 1
        self.register_buffer("used", mask, persistent=False)
        with torch.no_grad():  # and so they stay: no gradient passes the mask
            rows = torch.cat([mask, mask]).view(-1, 1, 1, 1, 1)
            self.quant_conv.weight.mul_(rows)
            self.quant_conv.bias.mul_(rows.flatten())
            self.post_quant_conv.weight.mul_(mask.view(1, -1, 1, 1, 1))

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance [B, T, h, w, 48] of pixels [B, 4k + 1, H, W, 3]."""
        x = pixels.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
        x = x.permute(0, 1, 2, 4, 6, 5, 3).flatten(4)
        mean, log_var = self.quant_conv(self.encoder(x)).float().chunk(2, -1)
        return mean * self.used, log_var.clamp(-20, 10) * self.used

    def pixels(self, latents: Tensor) -> Tensor:
        """Pixels of latents as they are before normalisation."""
        x = self.decoder(self.post_quant_conv(latents * self.used)).float()
        x = x.unflatten(-1, (3, 2, 2)).permute(0, 1, 2, 6, 3, 5, 4)
        return x.flatten(4, 5).flatten(2, 3)


def compile_blocks() -> None:
    """Fuse norm, activation and the gathering of frames. Each shape is compiled once."""
    import torch._dynamo

    torch._dynamo.config.cache_size_limit = 512
    torch._dynamo.config.accumulated_cache_size_limit = 4096
    ResidualBlock.activated = staticmethod(torch.compile(_activated, dynamic=False))
