"""Deploy files of vLLM-Omni: the YAML of one stage, as the flags that it stands for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_cosmos3.errors import InvalidRequest

FLAG = "--deploy-config"
SECTIONS = ("engine_args", "parallel_config", "model_config")  # whose keys stand for themselves
INERT = ("stage_id", "stage_type", "final_output", "final_output_type")
# Of ours, for keys that are no flag.
NAMES = {"devices": "generator_devices", "num_replicas": "generator_replicas"}


def deploy_flags(path: str) -> Sequence[str]:
    """The flags of the only stage of a deploy file.

    Raises:
        InvalidRequest: it cannot be read, or divides the model among several stages.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InvalidRequest(FLAG, path, f"a file that can be read ({reason})") from None
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InvalidRequest(FLAG, path, f"a YAML file ({reason})") from None
    stages = content.get("stages", content.get("stage_args")) if isinstance(content, dict) else None
    if not isinstance(stages, list) or len(stages) != 1 or not isinstance(stages[0], dict):
        raise InvalidRequest(FLAG, path, "a file with a list of one stage under 'stages'")
    return list(_flags(stages[0]))


def _flags(stage: Mapping[str, Any]) -> Iterator[str]:
    """The flags of a section and of those in it. What is false or null is not there."""
    for key, value in stage.items():
        name = f"--{NAMES.get(key, key).replace('_', '-')}"
        if key in SECTIONS and isinstance(value, Mapping):
            yield from _flags(value)
        elif key in INERT or value is None:
            continue
        elif key == "guardrails":
            yield from () if value else ("--no-guardrails",)
        elif isinstance(value, bool):
            yield from (name,) if value else ()
        else:
            yield name
            yield json.dumps(value) if isinstance(value, (dict, list)) else str(value)
