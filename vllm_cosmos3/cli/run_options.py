"""What a run of the generator is told by the command line, and the models that it needs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_cosmos3.cli.ranks import Part
from vllm_cosmos3.engine_options import EngineOptions
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.imports import uncollected
from vllm_cosmos3.request.request import GenerateRequest
from vllm_cosmos3.stage.launcher import EXTERNAL, launched

if TYPE_CHECKING:  # vLLM, which --help should not wait for
    from vllm_cosmos3.checkpoint.config import ModelConfig
    from vllm_cosmos3.engine import Cosmos3
    from vllm_cosmos3.reasoner.offline import Reasoner
    from vllm_cosmos3.request.plan import Plan
    from vllm_cosmos3.request.prompts import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How requests are run and their results written.

    ``crf`` is the quality of H.264, ``image_quality`` that of pictures with losses, and ``inputs``
    are the batch files, if any. ``location`` is the folder of the results, for batch files perhaps a
    URL. ``reasoner_url`` is that of a reasoner beside the generator. ``links`` names results as phyai does,
    too. ``shard_size`` is how many results a WebDataset shard has, None where they stay files, ``ray``
    the address of a cluster, empty for one of this machine, None without Ray. ``part`` is what this process does of the work, a ``replica`` beside others of one command, of which one ``leads``, ``reasoner_ranks`` how many ranks share the
    reasoner.

    Raises:
        InvalidRequest: results cannot be written like that.
    """

    engine: EngineOptions
    inputs: tuple[str, ...]
    location: str
    name: str
    crf: int
    image_type: str
    image_quality: int
    timings_json: Path | None
    resume: bool
    keep_going: bool
    dry_run: bool
    upsample_prompt: bool
    enforce_eager: bool
    part: Part
    replica: bool
    leads: bool
    benchmark: bool
    links: bool
    reasoner_ranks: int
    reasoner_url: str | None
    shard_size: int | None
    ray: str | None

    @property
    def out(self) -> Path:
        """The folder of the results, where it is one of this machine."""
        return Path(self.location)

    @property
    def launched(self) -> bool:
        """Whether every rank runs this command, all for the same results."""
        return self.engine.distributed_executor_backend == EXTERNAL

    @property
    def speaks(self) -> bool:
        """Whether this process tells what all processes of the command know."""
        place = launched()
        return self.leads and (place is None or place.rank == 0)

    def alone(self) -> RunOptions | None:
        """The same for one process that starts the ranks itself; None where that is another rank.

        For what one process has to know alone: what the reasoner writes, the last frame of a record.

        Raises:
            InvalidRequest: no launcher has started this process.
        """
        if not self.launched:
            return self
        ranks, place = self.engine.parallel.world_size, launched()
        if place is None:
            possible = "left out, or used under torchrun"
            raise InvalidRequest("distributed_executor_backend", EXTERNAL, possible)
        if not place.leads(ranks):
            return None
        place.leave(ranks)
        engine = replace(self.engine, distributed_executor_backend=None)
        return replace(self, engine=engine, reasoner_ranks=ranks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Planner:
    """Plans requests with everything but the weights: a mistake should not wait for them."""

    model: ModelConfig
    tokenizer: Tokenizer

    def __call__(self, request: GenerateRequest) -> Plan:
        from vllm_cosmos3.request.planner import make_plan

        return make_plan(request, self.model, self.tokenizer)


def planner(engine: EngineOptions) -> Planner:
    """The planner of a checkpoint, of which all but the weights is fetched if need be."""
    from vllm_cosmos3.checkpoint.config import read_config
    from vllm_cosmos3.checkpoint.hub import resolve
    from vllm_cosmos3.request.prompts import load_tokenizer

    folder = resolve(engine.model, engine.revision, weights=False)
    config = engine.applied(read_config(folder, engine.checkpoint_kind))
    return Planner(model=config, tokenizer=load_tokenizer(config.path))


def open_generator(engine: EngineOptions) -> Cosmos3:
    """The generator with its weights."""
    with uncollected():
        from vllm_cosmos3.engine import Cosmos3

    return Cosmos3(**asdict(engine))


def open_reasoner(options: RunOptions) -> Reasoner:
    """The reasoner of the same checkpoint. Close it before the generator is loaded."""
    from vllm_cosmos3.reasoner.offline import Reasoner

    engine = options.engine
    return Reasoner(
        engine.model,
        revision=engine.revision,
        dtype=engine.dtype,
        tensor_parallel_size=options.reasoner_ranks,
        load_format=engine.load_format,
        enforce_eager=options.enforce_eager,
    )
