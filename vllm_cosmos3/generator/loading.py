"""Loading of a checkpoint: every model of the generator, as far as it is this rank's."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vllm_cosmos3.checkpoint.adapters.adapter import Adapter
from vllm_cosmos3.checkpoint.adapters.merging import Merging
from vllm_cosmos3.checkpoint.config import ModelConfig
from vllm_cosmos3.checkpoint.shards import Table, Target
from vllm_cosmos3.checkpoint.weights import Prepare, load_dummy_weights, load_weights
from vllm_cosmos3.engine_options import EngineConfig
from vllm_cosmos3.generator.memory import check_weights, resolve_residency, usual_work
from vllm_cosmos3.generator.memory.reservation import memory_of
from vllm_cosmos3.generator.models.components import Component, components
from vllm_cosmos3.generator.models.modalities import make_coder
from vllm_cosmos3.generator.models.quantization import check_device, preparation
from vllm_cosmos3.generator.models.stored_modalities import coders
from vllm_cosmos3.generator.models.transformer import Transformer
from vllm_cosmos3.generator.models.vae import VideoVAE
from vllm_cosmos3.generator.weight_updates import WeightUpdates, make_receiver
from vllm_cosmos3.parallel.attention import make_attend
from vllm_cosmos3.parallel.host_copy import HostCopy, tensors_of
from vllm_cosmos3.parallel.mesh import Mesh

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModels:
    """The models of a rank, and the ``config`` with every choice made. ``coders`` by modality.

    ``copy`` is that of all weights on the device. ``updates`` are those of the transformer by a
    trainer, where the options allow them.
    """

    transformer: Transformer
    vae: VideoVAE
    coders: dict[str, nn.Module]
    config: EngineConfig
    copy: HostCopy
    updates: WeightUpdates | None


def load_models(
    model: ModelConfig, config: EngineConfig, mesh: Mesh, device: torch.device
) -> LoadedModels:
    """Build and fill all of them.

    Raises:
        CheckpointError: a file is missing, corrupt or of another architecture.
        OutOfMemory: the weights do not fit into the device.
    """
    usual, limit = usual_work(model), memory_of(device, config.memory_limit)
    check_device(model.quantization, device)
    config = resolve_residency(model, config, usual, limit)
    check_weights(model, config, usual, limit)
    parts = {part.folder: part for part in components(model)}
    transformer = _transformer(model, config, mesh, device)
    _fill(transformer, parts["transformer"], model, config, device)
    transformer.rest_on_host(
        text=config.und_residency == "host", layers=config.enable_layerwise_offload
    )
    with device:
        vae = VideoVAE(model.vae, mesh.world, config.parallel.vae_parallel).to(transformer.dtype)
    _fill(vae, parts["vae"], model, config, device)
    if device.type != "cpu":
        vae.channels_last()
    built = {}
    for name, coder in coders(model).items():
        with device:
            built[name] = make_coder(name, model)
        _fill(built[name], parts[coder.folder], model, config, device)
    modules = (transformer, vae, *built.values())
    copy = HostCopy(t for t in tensors_of(modules) if t.device.type != "cpu")
    updates = None
    if config.weight_transfer is not None:
        part = parts["transformer"]
        receiver = make_receiver(config.weight_transfer, mesh.world, device)
        prepare = _prepare(part, model, device, dummy=False)
        updates = WeightUpdates(transformer, part, prepare, receiver, copy, mesh.world)
    return LoadedModels(
        transformer=transformer,
        vae=vae,
        coders=built,
        config=config,
        copy=copy,
        updates=updates,
    )


def _transformer(
    model: ModelConfig, config: EngineConfig, mesh: Mesh, device: torch.device
) -> Transformer:
    dtype, host = getattr(torch, config.dtype), torch.device("cpu")
    attend = make_attend(
        config.attention_backend,
        device=device,
        dtype=dtype,
        head_dim=model.transformer.head_dim,
    )
    return Transformer(
        model.transformer,
        mesh,
        attend,
        dtype=dtype,
        device=device,
        quantization=model.quantization,
        text_device=host if config.und_residency == "host" else device,
        layer_device=host if config.enable_layerwise_offload else device,
    )


def _fill(
    module: nn.Module,
    part: Component,
    model: ModelConfig,
    config: EngineConfig,
    device: torch.device,
) -> None:
    dummy, keep = config.load_format == "dummy", config.weight_transfer is not None
    prepare = _prepare(part, model, device, dummy=dummy)
    if part.folder == "transformer":
        _tell_unused(model.adapters, part.table)
    if dummy:
        load_dummy_weights(
            module, part.table, part.shapes, device=device, prepare=prepare, keep=keep
        )
    else:
        folder, fp8 = config.model / part.folder, part.fp8_in(model)
        load_weights(module, part.table, folder, part.shapes, fp8, prepare, keep=keep)
    module.eval()


def _prepare(part: Component, model: ModelConfig, device: torch.device, *, dummy: bool) -> Prepare:
    """What becomes of the tensors of a component before they are shared among ranks."""
    prepare = preparation(model.quantization, part.matrices, part.shapes, device, dummy=dummy)
    if model.adapters and part.folder == "transformer":
        return _merged_first(Merging(model.adapters, device), prepare)
    return prepare


def _merged_first(merge: Merging, prepare: Prepare) -> Prepare:
    """The preparation of tensors that adapters change before."""

    def prepared(name: str, target: Target, tensor: Tensor) -> Iterable[tuple[Target, Tensor]]:
        return prepare(name, target, merge(name, tensor))

    return prepared


def _tell_unused(adapters: Iterable[Adapter], table: Table) -> None:
    """Warn of changes to what the generator does not load, such as the head of the text tower."""
    for adapter in adapters:
        unused = sorted(adapter.pairs.keys() - table.keys())
        if unused:
            what = f"{', '.join(unused[:4])}{' ...' if len(unused) > 4 else ''}"
            logger.warning("%s: the generator does not use %s", adapter.name, what)
