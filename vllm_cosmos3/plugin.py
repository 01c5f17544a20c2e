"""What vLLM learns from this package: entry point of the group ``vllm.general_plugins``.

vLLM calls it in every process, so it is cheap and can be repeated. Nothing of vLLM is replaced:
the architectures, the loader and the parsers are added under names of their own.
"""

from __future__ import annotations

from vllm_cosmos3.reasoner.root_config import ARCHITECTURE

UPSTREAM_ARCHITECTURE = "Cosmos3ForConditionalGeneration"  # the name in the published config.json
MODEL = "vllm_cosmos3.reasoner.model:Cosmos3ReasonerForConditionalGeneration"
NAME = "cosmos3"  # of the config format, the video loader and the reasoning parser


def register() -> None:
    """Register the reasoner with vLLM. A broken vLLM raises here, where the user can see it."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.reasoning import ReasoningParserManager

    from vllm_cosmos3.reasoner.startup import ReasonerStartup

    _register_config()
    for name in (ARCHITECTURE, UPSTREAM_ARCHITECTURE):
        if name not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(name, MODEL)
            MODELS_CONFIG_MAP[name] = ReasonerStartup
    ReasoningParserManager.register_lazy_module(
        NAME, "vllm_cosmos3.reasoner.reasoning_parser", "Cosmos3ReasoningParser"
    )
    _register_media()


def _register_config() -> None:
    """The config format for folders without a root config.json, and the model type where new."""
    from vllm.transformers_utils.config import _CONFIG_FORMAT_TO_CONFIG_PARSER

    from vllm_cosmos3.compat import knows_model_type
    from vllm_cosmos3.reasoner.config_parser import Cosmos3ConfigParser
    from vllm_cosmos3.reasoner.root_config import MODEL_TYPE

    # register_config_parser() would log a line in each process, and a warning when repeated.
    _CONFIG_FORMAT_TO_CONFIG_PARSER[NAME] = Cosmos3ConfigParser
    if not knows_model_type(MODEL_TYPE):
        from transformers import AutoConfig, Qwen3VLConfig

        AutoConfig.register(
            MODEL_TYPE, type("Cosmos3Config", (Qwen3VLConfig,), {"model_type": MODEL_TYPE})
        )


def _register_media() -> None:
    # They register themselves, vLLM's idiom.
    from vllm_cosmos3.reasoner.media import connector, video_loader  # noqa: F401
