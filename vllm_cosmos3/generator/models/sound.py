"""The AVAE sound autoencoder: stereo waveform at 48 kHz to 25 latent frames of 64 channels a second.

Convolutions are weight-normalised; the checkpoint's direction and length of every weight are kept
as they are and multiplied in one place, `normalised`. Module names are those of the
checkpoint. Shape suffixes: B batch, C channels, S samples or frames.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_cosmos3.checkpoint.config import SoundConfig
from vllm_cosmos3.errors import Unsupported

PEAK = 0.95  # the loudest sample of what is encoded


class SoundVAE(nn.Module):
    """Latents to waveform, and back where ``encoder`` is True and the checkpoint has one."""

    def __init__(self, config: SoundConfig, *, encoder: bool) -> None:
        super().__init__()
        self.config = config
        self.decoder = SoundDecoder(config)
        self.encoder = SoundEncoder(config) if encoder else None

    @torch.no_grad()
    def decode(self, latents_CS: Tensor) -> Tensor:
        """``latents`` [64, T_s] to float32 [2, 1920 * T_s] in [-1, 1]."""
        x = latents_CS[None].to(next(self.decoder.parameters()).dtype)
        return self.decoder(x)[0].float().clamp_(-1, 1)

    @torch.no_grad()
    def encode(self, waveform_CS: Tensor) -> Tensor:
        """Posterior mean of ``waveform`` [2, N]: float32 [64, ceil(N / 1920)].

        The loudness is normalised first and the end filled up with silence. Unsupported where there
        is no encoder.
        """
        if self.encoder is None:
            raise Unsupported(
                "sound cannot be encoded: the sound tokenizer was loaded without encoder"
            )
        x = waveform_CS[None].float()
        x = x / (x.abs().max() + 1e-5) * PEAK
        x = F.pad(x, (0, -x.shape[2] % self.config.hop_size))
        mean, _ = self.encoder(x)[0].float().chunk(2, dim=0)
        return mean


class SoundDecoder(nn.Module):
    """Latents [B, 64, S] to waveform [B, 2, S * hop]."""

    def __init__(self, config: SoundConfig) -> None:
        super().__init__()
        widths = [config.dec_dim * factor for factor in (*config.dec_c_mults[::-1], 1)]
        steps = zip(pairwise(widths), config.dec_strides[::-1], strict=True)
        self.conv1 = Conv(config.vocoder_input_dim, widths[0], 7)
        self.block = nn.ModuleList(SoundUpBlock(*pair, stride) for pair, stride in steps)
        self.snake1 = Snake(widths[-1])
        self.conv2 = Conv(widths[-1], config.dec_out_channels, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for block in self.block:
            x = block(x)
        return self.conv2(self.snake1(x))


class SoundUpBlock(nn.Module):
    """``stride`` times as many samples, then three residual units of growing reach."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.snake1 = Snake(before)
        self.conv_t1 = UpConv(before, after, stride)
        self.res_unit1 = ResidualUnit(after, dilation=1)
        self.res_unit2 = ResidualUnit(after, dilation=3)
        self.res_unit3 = ResidualUnit(after, dilation=9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_t1(self.snake1(x))
        return self.res_unit3(self.res_unit2(self.res_unit1(x)))


class ResidualUnit(nn.Module):
    """A dilated and a pointwise convolution with a shortcut."""

    def __init__(self, channels: int, *, dilation: int) -> None:
        super().__init__()
        self.snake1 = Snake(channels)
        self.conv1 = Conv(channels, channels, 7, dilation=dilation)
        self.snake2 = Snake(channels)
        self.conv2 = Conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.snake2(self.conv1(self.snake1(x))))


class SoundEncoder(nn.Module):
    """Waveform [B, 2, S] to mean and scale [B, 128, S / hop], from its short-time spectrum."""

    def __init__(self, config: SoundConfig) -> None:
        super().__init__()
        self.config = config
        spectrum = (2 if config.stereo else 1) * (config.enc_n_fft + 2)
        widths = [config.enc_dim * factor for factor in config.enc_c_mults]
        steps = zip(pairwise([*widths, widths[-1]]), config.enc_strides, strict=True)
        layers: list[nn.Module] = [Conv(spectrum, widths[0], 1, bias=False)]
        for (before, after), stride in steps:
            layers += [ConvNeXt(before) for _ in range(config.enc_num_blocks)]
            layers += [Conv(before, after, 2 * stride, stride=stride)]
        layers += [Conv(widths[-1], config.enc_latent_dim, 1, bias=False)]
        self.layers = nn.Sequential(*layers)

    def forward(self, waveform: Tensor) -> Tensor:
        spectrum = self.spectrum(waveform)
        return self.layers(spectrum.to(next(self.parameters()).dtype))

    def spectrum(self, waveform_BCS: Tensor) -> Tensor:
        """Real parts, then imaginary parts of the frequencies, of each channel in turn; float32."""
        size, hop = self.config.enc_n_fft, self.config.enc_hop_length
        left = (size - hop) // 2
        padded = F.pad(waveform_BCS, (left, size - hop - left)).flatten(0, 1)
        window = torch.hann_window(size, device=padded.device)
        bins = torch.stft(padded, size, hop, window=window, center=False, return_complex=True)
        parts = torch.cat([bins.real, bins.imag], dim=1)
        return parts.unflatten(0, (waveform_BCS.shape[0], -1)).flatten(1, 2)


class ConvNeXt(nn.Module):
    """A depthwise convolution and a pointwise MLP with a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # "1" is the checkpoint's name for it.
        depthwise = nn.Conv1d(channels, channels, 7, padding=3, groups=channels)
        self.dwconv = nn.ModuleDict({"1": depthwise})
        self.norm = nn.LayerNorm(channels, eps=1e-5, bias=False)
        self.pwconv1 = nn.Conv1d(channels, 4 * channels, 1)
        self.act = Snake(4 * channels)
        self.pwconv2 = nn.Conv1d(4 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dwconv["1"](x)
        y = self.norm(y.transpose(1, 2)).transpose(1, 2)
        return x + self.pwconv2(self.act(self.pwconv1(y)))


class Snake(nn.Module):
    """x + sin(alpha x)^2 / beta per channel, both stored as logarithms (arXiv:2006.08195)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(1, channels, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sin(self.alpha.exp() * x).square() / (self.beta.exp() + 1e-9)


class Conv(nn.Module):
    """Weight-normalised convolution to S / stride samples."""

    def __init__(
        self,
        before: int,
        after: int,
        kernel: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.stride, self.dilation = stride, dilation
        # Samples that a kernel reaches beyond its stride, half of them on either side.
        self.padding = math.ceil((dilation * (kernel - 1) + 1 - stride) / 2)
        self.weight_g = nn.Parameter(torch.ones(after, 1, 1))
        self.weight_v = nn.Parameter(torch.empty(after, before, kernel))
        self.bias = nn.Parameter(torch.zeros(after)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        weight = normalised(self.weight_g, self.weight_v)
        return F.conv1d(x, weight, self.bias, self.stride, self.padding, self.dilation)


class UpConv(nn.Module):
    """Weight-normalised transposed convolution to S * stride samples."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.weight_g = nn.Parameter(torch.ones(before, 1, 1))
        self.weight_v = nn.Parameter(torch.empty(before, after, 2 * stride))
        self.bias = nn.Parameter(torch.zeros(after))

    def forward(self, x: Tensor) -> Tensor:
        weight = normalised(self.weight_g, self.weight_v)
        padding, extra = math.ceil(self.stride / 2), self.stride % 2
        return F.conv_transpose1d(x, weight, self.bias, self.stride, padding, extra)


def normalised(length: Tensor, direction: Tensor) -> Tensor:
    """The weight of ``length`` along ``direction``, row by row of dimension 0, via float32."""
    v = direction.float()
    return (v * (length.float() / v.norm(dim=(1, 2), keepdim=True))).to(direction.dtype)
