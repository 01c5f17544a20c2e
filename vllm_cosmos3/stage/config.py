"""Configuration of a stage, as whoever starts one gives it. Loads neither torch nor vLLM."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vllm_cosmos3.engine_options import EngineConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class StageConfig:
    """Configuration of a stage: what is run on which ranks. ``stage`` is "module:Class" of a `worker.Stage`.

    ``backend`` is a name that vLLM's ParallelConfig.distributed_executor_backend knows: "mp" for
    local processes, "uni" for the calling process, "ray", "external_launcher" under torchrun.
    On a Ray cluster the first rank is on this host, unless it may be ``anywhere``: one of several replicas.
    In ``scratch``, where it is given, ranks say how much they have loaded, and that they live.
    Seconds: ``timeout`` until a call that does not answer is taken for hung, unless ``call_limits``
    has others for the call's name; ``grace`` that other ranks have to answer once one has failed;
    ``update_timeout`` without a call of the trainer after which a weight update is given up.
    """

    engine: EngineConfig
    stage: str = "vllm_cosmos3.generator.pipeline:Pipeline"
    backend: str = "mp"
    anywhere: bool = False
    timeout: float = 1800.0
    call_limits: Mapping[str, float] = field(default_factory=dict)
    grace: float = 2.0
    update_timeout: float = math.inf
    scratch: Path | None = None
