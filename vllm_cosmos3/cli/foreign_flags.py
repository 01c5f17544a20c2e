"""Flags of other programs: what the Cosmos Framework, vLLM-Omni and phyai call things, in our words.

A command out of the history of a shell should run as it is. Every flag of another program is a row
of `FLAGS`: it becomes flags of ours, or has no effect, which is said with the reason, or is refused
with what to use instead. Underscores are dashes.
"""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from vllm_cosmos3.batch.records import parse_json
from vllm_cosmos3.cli.deploy_file import deploy_flags
from vllm_cosmos3.cli.flags import WIDTH, integer
from vllm_cosmos3.errors import InvalidRequest

TITLE = "flags of other programs"
GENERATE, SERVE, GENERATOR = "generate", "serve", "serve --surface generator"
Becomes = Callable[[str], Sequence[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignFlag:
    """A flag of another program: its names, how many words follow, and what becomes of it.

    ``becomes`` gives flags of ours for its value. ``effect`` is the help, or why it has none;
    ``instead`` is what a refusal proposes.
    """

    names: tuple[str, ...]
    words: int
    becomes: Becomes | None = None
    effect: str = ""
    instead: str = ""

    @property
    def spellings(self) -> tuple[str, ...]:
        """Its names; a switch can be negated."""
        if self.words or self.becomes is not None:
            return self.names
        return (*self.names, *(f"--no-{name[2:]}" for name in self.names))


def _becomes(names: str, becomes: str | Becomes, effect: str = "", words: int = 1) -> ForeignFlag:
    """A flag with a name of its own here, or with a function from its value to our flags."""
    if isinstance(becomes, str):
        ours = becomes
        effect = effect or ours
        return ForeignFlag(
            names=tuple(names.split()),
            words=words,
            becomes=lambda value: [ours, value][: 1 + words],
            effect=effect,
        )
    return ForeignFlag(names=tuple(names.split()), words=words, becomes=becomes, effect=effect)


def _nothing(names: str, reason: str, words: int = 0) -> ForeignFlag:
    return ForeignFlag(names=tuple(names.split()), words=words, effect=reason)


def _refused(names: str, instead: str, words: int = 1) -> ForeignFlag:
    return ForeignFlag(names=tuple(names.split()), words=words, instead=instead)


# What values become.


def _degree(flag: str) -> Becomes:
    """A degree of which 0 means whatever suits the ranks."""
    return lambda value: [] if value == "0" else [flag, value]


def _only(possible: str, *, instead: str, name: str) -> Becomes:
    """A choice of which one value is what happens here anyway."""

    def becomes(value: str) -> Sequence[str]:
        if value not in possible.split():
            raise InvalidRequest(name, value, instead, "unsupported")
        return []

    return becomes


def _crf(value: str) -> Sequence[str]:
    """From 0, the worst, to 10, lossless, as the framework's encoder counts."""
    if not value.isdigit() or int(value) > 10:
        raise InvalidRequest("--video-save-quality", integer(value), "an integer from 0 to 10")
    return ["--crf", str(int(51 * (1 - int(value) / 10)))]


def _vae_mode(value: str) -> Sequence[str]:
    return ["--vae-parallel", "tile" if value == "tile" else "halo"]


def _init_timeout(value: str) -> Sequence[str]:
    return ["--call-limits", f"load={value}"]


def _flow_shift(value: str) -> Sequence[str]:
    return ["--default-sampling-params", json.dumps({"flow_shift": _as_number(value)})]


def _cache_backend(value: str) -> Sequence[str]:
    if value not in ("none", "sea_cache"):
        raise InvalidRequest("--cache-backend", value, "none or sea_cache", "unsupported")
    cache = {"none": "none", "sea_cache": "sea"}[value]
    return ["--default-sampling-params", json.dumps({"step_cache": cache})]


def _cache_config(value: str) -> Sequence[str]:
    config = parse_json(value)
    if not isinstance(config, dict) or not config.keys() <= SEA_CACHE.keys():
        possible = f"a JSON object of {', '.join(SEA_CACHE)}"
        raise InvalidRequest("--cache-config", value, possible, "unsupported")
    ours = {SEA_CACHE[name]: number for name, number in config.items()}
    return ["--default-sampling-params", json.dumps(ours)]


def _as_number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


SEA_CACHE = {
    "sea_threshold": "step_cache_threshold",
    "sea_max_consecutive_cached": "step_cache_max_reused",
    "sea_residual_order": "step_cache_order",
}
_CLASSES = "Cosmos3OmniDiffusersPipeline Cosmos3OmniPipeline"
_WHOLE = "weights are whole on each rank; --tensor-parallel-size divides them"

FLAGS: Mapping[str, tuple[ForeignFlag, ...]] = {
    GENERATE: (
        _becomes("--input-files", "--input"),
        _becomes("--num-steps", "--num-inference-steps"),
        _becomes("--guidance", "--guidance-scale"),
        _becomes("--shift", "--flow-shift"),
        _becomes("--enable-sound", "--generate-sound", words=0),
        _becomes("--no-enable-sound", "--no-generate-sound", words=0),
        _becomes("--num-outputs -n", "--n"),
        _becomes("--prompt-upsampling", "--upsample-prompt", words=0),
        _becomes("--cp-size", _degree("--ulysses-degree"), "--ulysses-degree; 0: by the preset"),
        _becomes("--cfgp-size", _degree("--cfg-parallel-size"), "--cfg-parallel-size; 0: by the preset"),
        _becomes("--video-save-quality", _crf, "--crf, from 10, which is lossless, to 0"),
        _becomes("--image-save-quality", "--image-quality"),
        _becomes("--skip-invalid-samples", "--keep-going", words=0),
        _becomes("--diffusion-cache", lambda _: ["--step-cache", "sea"], "--step-cache sea", words=0),
        _becomes("--no-diffusion-cache", lambda _: ["--step-cache", "none"], "--step-cache none", words=0),
        _becomes("--diffusion-cache-thresh", "--step-cache-threshold"),
        _becomes("--diffusion-cache-residual-order", "--step-cache-order"),
        _becomes("--sampler", _only("unipc", instead="unipc: there is no other solver", name="--sampler"), "unipc, which is what runs"),
        _nothing("--dp-shard-size --dp-replicate-size", _WHOLE, words=1),
        _nothing("--use-torch-compile --use-cuda-graphs --compile-dynamic", "CUDA graphs are used where they help"),
        _nothing("--compiled-region", "CUDA graphs are used where they help", words=1),
        _nothing("--guardrails --offload-guardrail-models", "generate checks nothing, serve does"),
        _nothing("--max-num-seqs --max-model-len", "requests run one after the other", words=1),
        _nothing("--device-memory-utilization", "plan says what fits", words=1),
        _nothing("--debug", "VLLM_LOGGING_LEVEL=DEBUG shows more"),
        _refused("--warmup --num-iterations", "left out: benchmarks/latency.py repeats requests"),
        _refused("--profile", "left out: benchmarks/kernel_profile.py profiles", words=0),
        _refused("--quantization-method", "left out: --quantization fp8 is what there is"),
        _refused("--action-chunk-index", "left out: cut the rows of the chunk out of the file, or use --num-chunks"),
    ),
    SERVE: (
        _becomes("--usp", "--ulysses-degree"),
        _becomes("--no-guardrails --cosmos3-no-guardrails", lambda _: ["--guardrails", "off"], "--guardrails off", words=0),
        _becomes("--init-timeout --stage-init-timeout", _init_timeout, "--call-limits load=SECONDS"),
        _becomes("--flow-shift", _flow_shift, "--default-sampling-params with this flow_shift"),
        _becomes("--vae-parallel-mode", _vae_mode, "--vae-parallel: tile, or halo for those that shard"),
        _becomes("--enable-cpu-offload", lambda _: ["--und-residency", "host"], "--und-residency host", words=0),
        _becomes("--model-class-name", _only(_CLASSES, instead=f"{_CLASSES.split()[0]}, or left out", name="--model-class-name"), "that of Cosmos 3"),
        _becomes("--ring --ring-degree --allgather-degree", _only("1", instead="1: --ulysses-degree divides the sequence", name="--ring-degree"), "1; --ulysses-degree divides the sequence"),
        _nothing("--num-gpus", "the product of the degrees is the number of GPUs", words=1),
        _nothing("--vae-patch-parallel-size", "all ranks share the VAE, see --vae-parallel", words=1),
        _nothing("--vae-use-tiling --vae-use-slicing", "the VAE decodes in pieces of its own choice"),
        _nothing("--vae-fast-path", "there is one path", words=1),
        _nothing("--use-hsdp", _WHOLE),
        _nothing("--hsdp-shard-size --hsdp-replicate-size", _WHOLE, words=1),
        _nothing("--offload-guardrail-models", "they run on the CPU until frames come"),
        _becomes("--cache-backend", _cache_backend, "sea_cache is step_cache in --default-sampling-params"),
        _becomes("--cache-config", _cache_config, "the step_cache_... in --default-sampling-params"),
        _nothing("--max-generated-image-size", "requests say what fits", words=1),
        _nothing("--enable-diffusion-pipeline-profiler", "every job has its timings"),
        _nothing("--diffusion-compile-granularity --ulysses-mode", "there is one way", words=1),
        _refused("--step-execution", "left out: requests take turns by steps anyway", words=0),
        _refused("--stage-overrides", "left out: give the flags themselves"),
        _refused("--policy-server-config", "left out: --robot-action-space is its setting"),
    ),
    GENERATOR: (  # which vLLM would take for the reasoner
        _nothing("--enforce-eager", "CUDA graphs are used where they help"),
        _nothing("--trust-remote-code", "nothing of a checkpoint is run"),
        _nothing("--max-num-seqs", "requests take turns; --max-batch-size lets small ones share steps", words=1),
        _nothing("--distributed-executor-backend", "--generator-executor-backend is its name", words=1),
        _becomes("--quantization", "--generator-quantization"),
    ),
}  # fmt: skip
# Fields of a record that the framework takes as flags too; they hold for all records.
RECORD_FIELDS = (
    "model_mode", "vision_path", "prompt_path", "negative_prompt_file", "resolution",
    "aspect_ratio", "max_new_tokens",
)  # fmt: skip


def translated(command: str | None, argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of a command line in our flags, and a sentence on each flag without an effect.

    Raises:
        InvalidRequest: a flag that is refused, or has no value.
    """
    if command not in (GENERATE, SERVE):
        return list(argv), []
    words = [dashed(word) for word in argv]
    rows = FLAGS[command]
    if command == SERVE:
        words, alone = _surface(_with_deploy_file(words))
        rows = (*rows, *(FLAGS[GENERATOR] if alone else ()))
    table = {name: row for row in rows for name in row.spellings}
    found: list[str] = []
    notes: list[str] = []
    left = deque(words)
    while left:
        word = left.popleft()
        name, equals, value = word.partition("=")
        row = table.get(name)
        if row is None:
            found.append(word)
            continue
        if row.words and not equals:
            if not left:
                raise InvalidRequest(name, None, "followed by a value", "missing_required")
            value = left.popleft()
        if row.instead:
            raise InvalidRequest(name, value or None, row.instead, "unsupported")
        if row.becomes is not None:
            found += row.becomes(value)
        else:
            notes.append(f"{name} has no effect: {row.effect}")
    return _joined(found), notes


def dashed(word: str) -> str:
    """A flag with dashes for underscores, up to its value or to a part of it after a dot."""
    if not word.startswith("--"):
        return word
    end = re.search(r"[=.]|$", word)
    assert end is not None  # as every word has an end
    return word[: end.start()].replace("_", "-") + word[end.start() :]


def _surface(words: list[str]) -> tuple[list[str], bool]:
    """The words without --omni, which is a generator alone; and whether one is served alone."""
    chosen = [word for word in words if word.split("=")[0] == "--surface"]
    omni = "--omni" in words and not chosen
    words = [word for word in words if word != "--omni"]
    if omni:
        words += ["--surface", "generator"]
    alone = "--surface=generator" in words or ("--surface", "generator") in pairwise(words)
    return words, alone


def _with_deploy_file(words: list[str]) -> list[str]:
    """The words with those of a deploy file before them, over which they win."""
    rest: list[str] = []
    file: list[str] = []
    left = deque(words)
    while left:
        word = left.popleft()
        name, equals, value = word.partition("=")
        if name not in DEPLOY_FLAGS:
            rest.append(word)
            continue
        if not equals and not left:
            raise InvalidRequest(name, None, "followed by a file", "missing_required")
        file += [dashed(flag) for flag in deploy_flags(value if equals else left.popleft())]
    return [*file, *rest]


def _joined(words: list[str]) -> list[str]:
    """The words with one flag for several that add to each other."""
    for flag, join in JOINED.items():
        places = [index for index, word in enumerate(words[:-1]) if word == flag]
        if len(places) < 2:
            continue
        value = join([words[index + 1] for index in places])
        gone = {index + step for index in places for step in (0, 1)}
        words = [word for index, word in enumerate(words) if index not in gone] + [flag, value]
    return words


def _join_objects(texts: Sequence[str]) -> str:
    found: dict[str, Any] = {}
    for text in texts:
        value = parse_json(text)
        if not isinstance(value, dict):
            raise InvalidRequest("--default-sampling-params", text, "a JSON object")
        found |= value
    return json.dumps(found)


DEPLOY_FLAGS = ("--deploy-config", "--stage-configs-path")
JOINED: Mapping[str, Callable[[Sequence[str]], str]] = {
    "--call-limits": ",".join,
    "--default-sampling-params": _join_objects,
}


# Help.


def add_help(parser: argparse.ArgumentParser) -> None:
    """The last group of the help of ``serve``: the names that become ours. Others say why not."""
    names = [name for row in FLAGS[SERVE] if row.becomes for name in row.names]
    text = f"With dashes or underscores, see docs/commands.md: {', '.join([*DEPLOY_FLAGS, '--omni', *names])}"
    lines = textwrap.wrap(text, WIDTH - 2, break_on_hyphens=False)
    parser.add_argument_group(TITLE, "\n".join(lines))


def add_generate_flags(parser: argparse.ArgumentParser) -> None:
    """The last group of ``generate``, with what it parses itself."""
    text = "The Cosmos Framework's and phyai's, with dashes or underscores: docs/commands.md"
    add = parser.add_argument_group(TITLE, text).add_argument
    add("--parallelism-preset", metavar="NAME", help="torchrun's ranks: a mesh (latency), replicas (throughput)")  # fmt: skip
    add("--benchmark", action="store_true", help="also write the timings to DIR/benchmark.json")
    for name, flag in zip(RECORD_FIELDS, _record_flags(), strict=True):
        add(flag, dest="record", action="append", type=_item(name), help=argparse.SUPPRESS)


def _record_flags() -> list[str]:
    return [f"--{name.replace('_', '-')}" for name in RECORD_FIELDS]


def _item(name: str) -> Callable[[str], tuple[str, Any]]:
    return lambda text: (name, integer(text) if name == "max_new_tokens" else text)
