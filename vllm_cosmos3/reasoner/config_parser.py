"""The config format ``cosmos3``: ``vllm serve FOLDER --config-format cosmos3``.

For folders without a root ``config.json``. vLLM's automatic choice looks for that file and cannot be
extended, hence the flag.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoConfig, PretrainedConfig
from vllm.transformers_utils.config_parser_base import ConfigParserBase

from vllm_cosmos3.checkpoint.config import read_json
from vllm_cosmos3.reasoner.root_config import ARCHITECTURE, assemble


class Cosmos3ConfigParser(ConfigParserBase):
    """Root ``config.json`` where there is one, else the parts of the folder put together."""

    def parse(
        self,
        model: str | Path,
        trust_remote_code: bool,  # noqa: FBT001  # vLLM's signature
        revision: str | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], PretrainedConfig]:
        """The dictionary and the configuration object; CheckpointError names what is missing."""
        folder = Path(model)
        if not folder.is_dir():
            folder = Path(
                snapshot_download(str(model), revision=revision, allow_patterns=["*.json"])
            )
        root = folder / "config.json"
        values = read_json(root) if root.is_file() else assemble(folder)
        values["architectures"] = [ARCHITECTURE]
        return values, AutoConfig.for_model(**values)
