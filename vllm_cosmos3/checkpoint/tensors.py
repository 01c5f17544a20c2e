"""The tensors of a published checkpoint, computed from its configuration: name -> shape.

The writer draws from these tables and the loaders check against them. Names and shapes are those of
the files, not of any module in memory. Linear weights are [out, in]. Loads no torch.
"""

from __future__ import annotations

import itertools
import math
import re

from vllm_cosmos3.checkpoint.config import (
    SiglipConfig,
    SoundConfig,
    TransformerConfig,
    VAEConfig,
    VisionConfig,
)

Tensors = dict[str, tuple[int, ...]]

TIME_FREQUENCIES = 256  # sinusoids that enter the time embedder
GENERATION_NORMS = ("norm_added_q", "norm_added_k")


def transformer_tensors(cfg: TransformerConfig) -> Tensors:
    """``transformer/``: both towers, their heads, and the adapters that the checkpoint has."""
    width, patch = cfg.hidden_size, cfg.patch_latent_dim
    tensors: Tensors = {
        "embed_tokens.weight": (cfg.vocab_size, width),
        "lm_head.weight": (cfg.vocab_size, width),
        "norm.weight": (width,),
        "norm_moe_gen.weight": (width,),
        **_linear("proj_in", patch, width),
        **_linear("proj_out", width, patch),
        **_linear("time_embedder.linear_1", TIME_FREQUENCIES, width),
        **_linear("time_embedder.linear_2", width, width),
    }
    for index in range(cfg.num_hidden_layers):
        tensors |= _transformer_layer(f"layers.{index}", cfg)
    if cfg.action_gen:
        tensors |= _domain_linear("action_proj_in", cfg, cfg.action_dim, width)
        tensors |= _domain_linear("action_proj_out", cfg, width, cfg.action_dim)
        tensors["action_modality_embed"] = (width,)
    if cfg.sound_gen:
        tensors |= _linear("audio_proj_in", cfg.sound_dim, width)
        tensors |= _linear("audio_proj_out", width, cfg.sound_dim)
        tensors["audio_modality_embed"] = (width,)
    return tensors


# Names of ``transformer/`` that are the generation tower's or one of its adapters'.
GENERATION = re.compile(
    r"_moe_gen\.|\.add_[qkv]_proj\.|\.to_add_out\.|\.norm_added_[qk]\."
    r"|^(proj_in|proj_out|time_embedder|audio_|action_)"
)


def layer_matrices(tensors: Tensors) -> Tensors:
    """The matrices in the layers of both towers, which FP8 checkpoints hold as F8_E4M3."""
    return {n: s for n, s in tensors.items() if n.startswith("layers.") and len(s) == 2}


def scale_tensors(tensors: Tensors) -> Tensors:
    """What an FP8 checkpoint has beside each of them: a float32 scale of itself and of its input."""
    return {
        f"{name.removesuffix('weight')}{scale}": ()
        for name in layer_matrices(tensors)
        for scale in ("weight_scale", "input_scale")
    }


def vision_tensors(cfg: VisionConfig) -> Tensors:
    """``vision_encoder/``: the Qwen3-VL vision transformer that most reasoners see with."""
    width, merged = cfg.hidden_size, cfg.hidden_size * cfg.spatial_merge_size**2
    patch = (cfg.in_channels, cfg.temporal_patch_size, cfg.patch_size, cfg.patch_size)
    tensors: Tensors = {
        "patch_embed.proj.weight": (width, *patch),
        "patch_embed.proj.bias": (width,),
        "pos_embed.weight": (cfg.num_position_embeddings, width),
    }
    for index in range(cfg.depth):
        block = f"blocks.{index}"
        tensors |= {
            **_layer_norm(f"{block}.norm1", width),
            **_layer_norm(f"{block}.norm2", width),
            **_linear(f"{block}.attn.qkv", width, 3 * width),
            **_linear(f"{block}.attn.proj", width, width),
            **_linear(f"{block}.mlp.linear_fc1", width, cfg.intermediate_size),
            **_linear(f"{block}.mlp.linear_fc2", cfg.intermediate_size, width),
        }
    # The last merger normalises before it merges patches, the deepstack mergers after.
    mergers = {"merger": width}
    mergers |= {
        f"deepstack_merger_list.{i}": merged for i in range(len(cfg.deepstack_visual_indexes))
    }
    for merger, normalised in mergers.items():
        tensors |= {
            **_layer_norm(f"{merger}.norm", normalised),
            **_linear(f"{merger}.linear_fc1", merged, merged),
            **_linear(f"{merger}.linear_fc2", merged, cfg.out_hidden_size),
        }
    return tensors


def siglip_tensors(cfg: SiglipConfig) -> Tensors:
    """``vision_encoder/`` of Edge: SigLIP 2, and the projector that merges its patches."""
    width, merged = cfg.hidden_size, cfg.hidden_size * cfg.spatial_merge_size**2
    visual, projector = "model.visual", "model.projector"
    patch = cfg.num_channels * cfg.patch_size**2
    tensors: Tensors = {
        **_linear(f"{visual}.embeddings.patch_embedding", patch, width),
        f"{visual}.embeddings.position_embedding.weight": (cfg.num_patches, width),
    }
    for index in range(cfg.num_hidden_layers):
        layer = f"{visual}.encoder.layers.{index}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            tensors |= _linear(f"{layer}.self_attn.{part}", width, width)
        tensors |= {
            **_layer_norm(f"{layer}.layer_norm1", width),
            **_layer_norm(f"{layer}.layer_norm2", width),
            **_linear(f"{layer}.mlp.fc1", width, cfg.intermediate_size),
            **_linear(f"{layer}.mlp.fc2", cfg.intermediate_size, width),
        }
    return tensors | {
        **_layer_norm(f"{visual}.post_layernorm", width),
        **_layer_norm(f"{projector}.norm", width),
        **_linear(f"{projector}.linear_fc1", merged, cfg.projector_hidden_size),
        **_linear(f"{projector}.linear_fc2", cfg.projector_hidden_size, cfg.out_hidden_size),
    }


def vae_tensors(cfg: VAEConfig) -> Tensors:
    """``vae/``: the Wan 2.2 autoencoder. Convolutions are 3-D where the names do not say otherwise."""
    moments = 2 * cfg.z_dim
    return {
        **_vae_encoder(cfg),
        **_conv("quant_conv", moments, moments, 1, 1, 1),
        **_conv("post_quant_conv", cfg.z_dim, cfg.z_dim, 1, 1, 1),
        **_vae_decoder(cfg),
    }


def sound_tensors(cfg: SoundConfig) -> Tensors:
    """``sound_tokenizer/``: decoder, and the encoder where the checkpoint has one.

    Convolutions are weight-normalised: ``weight_g`` is the norm of each slice of ``weight_v`` along
    its first dimension (input channels in the transposed convolutions).
    """
    return {**(_sound_encoder(cfg) if cfg.encoder_enabled else {}), **_sound_decoder(cfg)}


def parameters(tensors: Tensors) -> int:
    """Number of values in all ``tensors``."""
    return sum(math.prod(shape) for shape in tensors.values())


def _transformer_layer(layer: str, cfg: TransformerConfig) -> Tensors:
    """One layer of both towers: the understanding names first, the generation names second."""
    width = cfg.hidden_size
    queries = cfg.num_attention_heads * cfg.head_dim
    keys = cfg.num_key_value_heads * cfg.head_dim
    towers = (
        ("to_q", "to_k", "to_v", "to_out", cfg.backbone.text_norms, ""),
        ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", GENERATION_NORMS, "_moe_gen"),
    )
    tensors: Tensors = {}
    for q, k, v, out, norms, suffix in towers:
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp{suffix}"
        tensors |= {
            f"{attention}.{q}.weight": (queries, width),
            f"{attention}.{k}.weight": (keys, width),
            f"{attention}.{v}.weight": (keys, width),
            f"{attention}.{out}.weight": (width, queries),
            **{f"{attention}.{norm}.weight": (cfg.head_dim,) for norm in norms},
            **{
                f"{mlp}.{matrix}.weight": (cfg.intermediate_size, width)
                for matrix in cfg.backbone.mlp_inputs
            },
            f"{mlp}.down_proj.weight": (width, cfg.intermediate_size),
            f"{layer}.input_layernorm{suffix}.weight": (width,),
            f"{layer}.post_attention_layernorm{suffix}.weight": (width,),
        }
    return tensors


def _domain_linear(name: str, cfg: TransformerConfig, inputs: int, outputs: int) -> Tensors:
    """One matrix per embodiment; unlike every other linear layer each is stored as [in, out]."""
    return {
        f"{name}.fc.weight": (cfg.num_embodiment_domains, inputs * outputs),
        f"{name}.bias.weight": (cfg.num_embodiment_domains, outputs),
    }


def _vae_encoder(cfg: VAEConfig) -> Tensors:
    widths = [cfg.base_dim * multiple for multiple in (1, *cfg.dim_mult)]
    tensors = _conv("encoder.conv_in", cfg.in_channels, widths[0], 3, 3, 3)
    for index, (before, after) in enumerate(itertools.pairwise(widths)):
        block = f"encoder.down_blocks.{index}"
        for resnet in range(cfg.num_res_blocks):
            tensors |= _resnet(f"{block}.resnets.{resnet}", before if resnet == 0 else after, after)
        if index < len(cfg.temporal_downsample):
            tensors |= _conv(f"{block}.downsampler.resample.1", after, after, 3, 3)
            if cfg.temporal_downsample[index]:
                tensors |= _conv(f"{block}.downsampler.time_conv", after, after, 3, 1, 1)
    return {
        **tensors,
        **_middle("encoder.mid_block", widths[-1]),
        "encoder.norm_out.gamma": (widths[-1], 1, 1, 1),
        **_conv("encoder.conv_out", widths[-1], 2 * cfg.z_dim, 3, 3, 3),
    }


def _vae_decoder(cfg: VAEConfig) -> Tensors:
    multiples = (cfg.dim_mult[-1], *reversed(cfg.dim_mult))
    widths = [cfg.decoder_base_dim * multiple for multiple in multiples]
    temporal_upsample = cfg.temporal_downsample[::-1]
    tensors = _conv("decoder.conv_in", cfg.z_dim, widths[0], 3, 3, 3)
    tensors |= _middle("decoder.mid_block", widths[0])
    for index, (before, after) in enumerate(itertools.pairwise(widths)):
        block = f"decoder.up_blocks.{index}"
        for resnet in range(cfg.num_res_blocks + 1):
            tensors |= _resnet(f"{block}.resnets.{resnet}", before if resnet == 0 else after, after)
        if index < len(temporal_upsample):
            tensors |= _conv(f"{block}.upsampler.resample.1", after, after, 3, 3)
            if temporal_upsample[index]:
                tensors |= _conv(f"{block}.upsampler.time_conv", after, 2 * after, 3, 1, 1)
    return {
        **tensors,
        "decoder.norm_out.gamma": (widths[-1], 1, 1, 1),
        **_conv("decoder.conv_out", widths[-1], cfg.out_channels, 3, 3, 3),
    }


def _middle(block: str, width: int) -> Tensors:
    return {
        f"{block}.attentions.0.norm.gamma": (width, 1, 1),
        **_conv(f"{block}.attentions.0.to_qkv", width, 3 * width, 1, 1),
        **_conv(f"{block}.attentions.0.proj", width, width, 1, 1),
        **_resnet(f"{block}.resnets.0", width, width),
        **_resnet(f"{block}.resnets.1", width, width),
    }


def _resnet(name: str, before: int, after: int) -> Tensors:
    return {
        f"{name}.norm1.gamma": (before, 1, 1, 1),
        **_conv(f"{name}.conv1", before, after, 3, 3, 3),
        f"{name}.norm2.gamma": (after, 1, 1, 1),
        **_conv(f"{name}.conv2", after, after, 3, 3, 3),
        **(_conv(f"{name}.conv_shortcut", before, after, 1, 1, 1) if before != after else {}),
    }


def _sound_encoder(cfg: SoundConfig) -> Tensors:
    """Spectrogram, then per stage some ConvNeXt blocks and a strided convolution."""
    spectrum = (cfg.enc_n_fft + 2) * (2 if cfg.stereo else 1)  # real and imaginary halves
    widths = [cfg.enc_dim * multiple for multiple in cfg.enc_c_mults]
    tensors = _normed_conv("encoder.layers.0", spectrum, widths[0], 1, bias=False)
    layer = 1
    for width, after, stride in zip(
        widths, (*widths[1:], widths[-1]), cfg.enc_strides, strict=True
    ):
        for _ in range(cfg.enc_num_blocks):
            tensors |= _convnext(f"encoder.layers.{layer}", width)
            layer += 1
        tensors |= _normed_conv(f"encoder.layers.{layer}", width, after, 2 * stride)
        layer += 1
    last = f"encoder.layers.{layer}"
    return tensors | _normed_conv(last, widths[-1], cfg.enc_latent_dim, 1, bias=False)


def _convnext(name: str, width: int) -> Tensors:
    return {
        f"{name}.dwconv.1.weight": (width, 1, 7),
        f"{name}.dwconv.1.bias": (width,),
        f"{name}.norm.weight": (width,),
        **_conv(f"{name}.pwconv1", width, 4 * width, 1),
        **_snake(f"{name}.act", 4 * width),
        **_conv(f"{name}.pwconv2", 4 * width, width, 1),
    }


def _sound_decoder(cfg: SoundConfig) -> Tensors:
    """Per stride one transposed convolution and three dilated residual units."""
    widths = [cfg.dec_dim * multiple for multiple in (*reversed(cfg.dec_c_mults), 1)]
    tensors = _normed_conv("decoder.conv1", cfg.vocoder_input_dim, widths[0], 7)
    strides = reversed(cfg.dec_strides)
    for index, (before, after, stride) in enumerate(
        zip(widths[:-1], widths[1:], strides, strict=True)
    ):
        block = f"decoder.block.{index}"
        tensors |= _snake(f"{block}.snake1", before)
        tensors |= {
            f"{block}.conv_t1.weight_g": (before, 1, 1),
            f"{block}.conv_t1.weight_v": (before, after, 2 * stride),
            f"{block}.conv_t1.bias": (after,),
        }
        for unit in ("res_unit1", "res_unit2", "res_unit3"):
            tensors |= {
                **_snake(f"{block}.{unit}.snake1", after),
                **_normed_conv(f"{block}.{unit}.conv1", after, after, 7),
                **_snake(f"{block}.{unit}.snake2", after),
                **_normed_conv(f"{block}.{unit}.conv2", after, after, 1),
            }
    return {
        **tensors,
        **_snake("decoder.snake1", widths[-1]),
        **_normed_conv("decoder.conv2", widths[-1], cfg.dec_out_channels, 7, bias=False),
    }


def _linear(name: str, inputs: int, outputs: int) -> Tensors:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _conv(name: str, inputs: int, outputs: int, *kernel: int) -> Tensors:
    return {f"{name}.weight": (outputs, inputs, *kernel), f"{name}.bias": (outputs,)}


def _normed_conv(
    name: str, inputs: int, outputs: int, kernel: int, *, bias: bool = True
) -> Tensors:
    return {
        f"{name}.weight_g": (outputs, 1, 1),
        f"{name}.weight_v": (outputs, inputs, kernel),
        **({f"{name}.bias": (outputs,)} if bias else {}),
    }


def _layer_norm(name: str, width: int) -> Tensors:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _snake(name: str, width: int) -> Tensors:
    return {f"{name}.alpha": (1, width, 1), f"{name}.beta": (1, width, 1)}
