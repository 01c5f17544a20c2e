"""What the reasoner relies on in vLLM, asserted in seconds; run on every supported version."""

from __future__ import annotations

import importlib
import inspect
import weakref
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import zmq
from limits import HANG
from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.model_executor.models import config as model_hooks
from vllm.model_executor.models import qwen3_vl
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VisionAttention
from vllm.model_executor.models.registry import _LazyRegisteredModel
from vllm.multimodal.processing import BaseMultiModalProcessor
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY, Qwen3VLVideoBackend
from vllm.reasoning import ReasoningParserManager
from vllm.transformers_utils.config import get_config, get_config_parser

from vllm_cosmos3 import compat, plugin
from vllm_cosmos3.checkpoint.config import read_json
from vllm_cosmos3.errors import Cosmos3Error
from vllm_cosmos3.reasoner.required_tensors import expected_tensors
from vllm_cosmos3.reasoner.startup import ReasonerStartup
from vllm_cosmos3.reasoner.vision_attention import VisionAttention


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    plugin.register()
    plugin.register()  # vLLM calls it in every process, sometimes twice


def test_moved_names_are_found() -> None:
    delta = compat.DeltaMessage(reasoning="a", content="b")
    assert (delta.reasoning, delta.content) == ("a", "b")
    assert compat.has_serve_flag("allowed-origins")
    assert not compat.has_serve_flag("no-such-flag")
    assert compat.knows_model_type("cosmos3_omni")
    assert not compat.knows_model_type("no_such_model")


def test_attention_of_the_vision_tower_is_called_as_ours_is() -> None:
    assert qwen3_vl.Qwen2_5_VisionAttention is Qwen2_5_VisionAttention
    ours, theirs = (inspect.signature(kind.forward) for kind in (VisionAttention, Qwen2_5_VisionAttention))  # fmt: skip
    assert list(ours.parameters) == list(theirs.parameters)
    for name in ("qkv", "proj", "attn", "num_attention_heads_per_partition"):
        assert f"self.{name}" in inspect.getsource(Qwen2_5_VisionAttention.__init__)
    tower = inspect.getsource(qwen3_vl)
    assert "self.attn = Qwen2_5_VisionAttention(" in tower
    assert "self.blocks = nn.ModuleList(" in tower


def test_command_line_is_read_as_vllm_does() -> None:
    words = ["x", "-tp", "2", "-O3", "--compilation-config.mode", "3", "--enable_prefix_caching"]
    unknown, flags = compat.unknown_to_serve([*words, "--max-num-seq", "4", "--no-such", "-1"])
    assert unknown[0] == "--no-such"
    assert {"-tp", "--compilation-config", "--api-server-count"} <= set(flags)
    with pytest.raises(Cosmos3Error, match="--tensor-parallel-size/-tp: invalid int value: 'two'"):
        compat.unknown_to_serve(["x", "-tp", "two"])


def test_an_engine_leaves_no_context_of_zeromq() -> None:
    """The client of an engine's process, with the sockets and the thread that it has for it."""
    clients = importlib.import_module("vllm.v1.engine.core_client")
    assert "self.output_queue_thread = Thread(" in inspect.getsource(clients.SyncMPClient)
    context, path = zmq.Context(), "inproc://shutdown"
    receiving = context.socket(zmq.PAIR)
    receiving.bind(path)

    def receive() -> None:
        with receiving:
            receiving.recv()

    client = object.__new__(clients.SyncMPClient)
    client.resources = clients.BackgroundResources(ctx=context, shutdown_path=path)
    client.resources.input_socket = context.socket(zmq.ROUTER)
    client._finalizer = weakref.finalize(client, client.resources)
    client.output_queue_thread = Thread(target=receive)
    client.output_queue_thread.start()
    compat.end_engine(client, HANG)
    assert context.closed


def test_module_that_exists_nowhere_is_named() -> None:
    with pytest.raises(ImportError, match=r"vllm\.no_such_thing"):
        compat.first_module(("vllm.no_such_thing", "no_such_package.a"))


def test_architectures_are_registered_lazily() -> None:
    ours = ModelRegistry.models[plugin.ARCHITECTURE]
    assert isinstance(ours, _LazyRegisteredModel)
    assert f"{ours.module_name}:{ours.class_name}" == plugin.MODEL
    assert plugin.UPSTREAM_ARCHITECTURE in ModelRegistry.get_supported_archs()


def test_upstream_architecture_is_left_alone() -> None:
    upstream = ModelRegistry.models[plugin.UPSTREAM_ARCHITECTURE]
    assert upstream.module_name == "vllm.model_executor.models.cosmos3"


def test_hooks_of_the_configuration_are_called_by_vllm() -> None:
    assert model_hooks.MODELS_CONFIG_MAP[plugin.ARCHITECTURE] is ReasonerStartup
    for name, caller in (
        ("verify_and_update_config", VllmConfig.try_verify_and_update_config),
        (
            "verify_and_update_model_config",
            importlib.import_module("vllm.config.model").ModelConfig,
        ),
    ):
        assert callable(getattr(model_hooks.VerifyAndUpdateConfig, name))
        assert f".{name}(" in inspect.getsource(caller)


def test_reasoning_parser_is_registered() -> None:
    parser = ReasoningParserManager.get_reasoning_parser(plugin.NAME)
    assert not inspect.isabstract(parser)
    assert "get_streaming_fallback_content" in inspect.getsource(
        importlib.import_module("vllm.parser.abstract_parser")
    )


def test_video_loader_is_registered_for_nobody_else() -> None:
    loader = VIDEO_LOADER_REGISTRY.load(plugin.NAME)
    assert isinstance(loader, Qwen3VLVideoBackend) or issubclass(loader, Qwen3VLVideoBackend)
    assert plugin.NAME not in VIDEO_LOADER_REGISTRY.processor2backend.values()
    parameters = inspect.signature(Qwen3VLVideoBackend.load_bytes).parameters
    assert {"data", "num_frames", "fps", "kwargs"} <= parameters.keys()


def test_processors_take_one_object_of_inputs() -> None:
    parameters = list(inspect.signature(BaseMultiModalProcessor.apply).parameters)
    assert parameters[:2] == ["self", "inputs"]
    inputs = importlib.import_module("vllm.multimodal.processing.inputs").ProcessorInputs
    assert {"mm_data_items", "hf_processor_mm_kwargs"} <= inputs.__dataclass_fields__.keys()


def test_config_parser_reads_both_kinds_of_folder(tiny_checkpoint: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for part in ("transformer", "vision_encoder", "text_tokenizer"):
        (bare / part).symlink_to(tiny_checkpoint / part)
    assert type(get_config_parser(plugin.NAME)).__name__ == "Cosmos3ConfigParser"
    for folder in (tiny_checkpoint, bare):
        config = get_config(folder, trust_remote_code=False, config_format=plugin.NAME)
        assert config.architectures == [plugin.ARCHITECTURE]
        assert config.model_type == "cosmos3_omni"
        assert config.text_config.hidden_size == 64
        assert config.vision_config.depth > 0


def test_every_name_of_the_checkpoint_has_a_place(tiny_checkpoint: Path) -> None:
    reasoner = importlib.import_module("vllm_cosmos3.reasoner.model")
    model: Any = reasoner.Cosmos3ReasonerForConditionalGeneration
    assert issubclass(model, qwen3_vl.Qwen3VLForConditionalGeneration)
    names = list(expected_tensors(read_json(tiny_checkpoint / "config.json")))
    mapper = model.hf_to_vllm_mapper
    places = [name for name, _ in mapper.apply((name, None) for name in names)]
    assert len(places) == len(names)
    assert all(place.startswith(("language_model.", "visual.")) for place in places)
    assert "language_model.model.layers.0.self_attn.o_proj.weight" in places
    dropped = ["layers.0.self_attn.to_add_out.weight", "proj_in.bias", "audio_modality_embed"]
    assert not list(mapper.apply((name, None) for name in dropped))
    adapter = ["model.language_model.layers.0.mlp.up_proj.lora_A.weight"]  # of transformers
    (place,) = (name for name, _ in mapper.apply((name, None) for name in adapter))
    assert place == "language_model.model.layers.0.mlp.up_proj.lora_A.weight"
