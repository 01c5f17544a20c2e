"""Modalities as a checkpoint has them, a row each: the tensors of their adapters, and their autoencoders.

What is computed of them is in `modalities`. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vllm_cosmos3.checkpoint.config import ModelConfig, SoundConfig, TransformerConfig
from vllm_cosmos3.checkpoint.tensors import Tensors, sound_tensors

FLOAT32 = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentCoder:
    """The autoencoder of a modality, a part of the checkpoint of its own.

    ``folder`` holds ``tensors``. ``nbytes`` is the peak of decoding latents of a shape, and more than that of
    encoding them. A checkpoint that is not ``present`` has none.
    """

    folder: str
    present: Callable[[ModelConfig], bool]
    tensors: Callable[[ModelConfig], Tensors]
    nbytes: Callable[[ModelConfig, tuple[int, ...]], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredModality:
    """One kind of latents.

    ``weights`` name the parameters of its adapter in the checkpoint, if the checkpoint is ``trained`` for it. A
    ``coder`` makes an output of latents, and latents of a source.
    """

    weights: Mapping[str, str]
    trained: Callable[[TransformerConfig], bool] = lambda _: True
    coder: LatentCoder | None = None


def trained_modalities(config: TransformerConfig) -> tuple[str, ...]:
    """The modalities that a checkpoint has adapters for."""
    return tuple(name for name, stored in STORED_MODALITIES.items() if stored.trained(config))


def adapter_weights(config: TransformerConfig) -> dict[str, str]:
    """Names in ``transformer/`` of the parameters of all `adapters`."""
    return {
        theirs: f"adapters.{name}.{ours}"
        for name in trained_modalities(config)
        for theirs, ours in STORED_MODALITIES[name].weights.items()
    }


def coders(model: ModelConfig) -> dict[str, LatentCoder]:
    """The autoencoders that a checkpoint has, by modality. That of the video has more to it."""
    found = ((name, stored.coder) for name, stored in STORED_MODALITIES.items())
    return {name: coder for name, coder in found if coder and coder.present(model)}


def sound_of(model: ModelConfig) -> SoundConfig:
    """What a checkpoint with an autoencoder of sound says of it."""
    assert model.sound is not None  # or its autoencoder is not present
    return model.sound


def decode_bytes(config: SoundConfig, length: int) -> int:
    """Bytes of decoding ``length`` latents, which takes most in the last block, in float32."""
    widths = [config.dec_dim * factor for factor in (*config.dec_c_mults[::-1], 1)]
    peak, samples = 0, length
    for before, after, stride in zip(widths, widths[1:], config.dec_strides[::-1], strict=False):
        given, samples = before * samples, samples * stride
        kernel = before * after * 2 * stride
        made = after * samples
        # The input, its snake, twice the kernel, then: own input, one unit's, its inner one, snake.
        peak = max(peak, given * 3 + made, given * 2 + made + 2 * kernel, given + made * 5)
    return peak * FLOAT32


STORED_MODALITIES = {
    "vision": StoredModality(
        weights={
            "proj_in.weight": "proj_in.weight",
            "proj_in.bias": "proj_in.bias",
            "proj_out.weight": "proj_out.weight",
            "proj_out.bias": "proj_out.bias",
        },
    ),
    "sound": StoredModality(
        trained=lambda config: config.sound_gen,
        weights={
            "audio_proj_in.weight": "proj_in.weight",
            "audio_proj_in.bias": "proj_in.bias",
            "audio_proj_out.weight": "proj_out.weight",
            "audio_proj_out.bias": "proj_out.bias",
            "audio_modality_embed": "modality",
        },
        coder=LatentCoder(
            folder="sound_tokenizer",
            present=lambda model: model.sound is not None,
            tensors=lambda model: sound_tensors(sound_of(model)),
            nbytes=lambda model, shape: decode_bytes(sound_of(model), shape[1]),
        ),
    ),
    "action": StoredModality(
        trained=lambda config: config.action_gen,
        weights={
            "action_proj_in.fc.weight": "weight_in",
            "action_proj_in.bias.weight": "bias_in",
            "action_proj_out.fc.weight": "weight_out",
            "action_proj_out.bias.weight": "bias_out",
            "action_modality_embed": "modality",
        },
    ),
}
