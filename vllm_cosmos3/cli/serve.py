"""``vllm-cosmos3 serve``: the stock ``vllm serve`` with the defaults that Cosmos 3 needs.

It checks what can be checked in a moment, prints the equivalent stock command and becomes it.
Flags that it does not know go to vLLM unchanged.
"""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_cosmos3.checkpoint.config import read_json
from vllm_cosmos3.checkpoint.hub import full_name, is_checkpoint, resolve
from vllm_cosmos3.cli import config_file, foreign_flags, serve_generator
from vllm_cosmos3.cli.flags import Help, UnknownFlag, add_server_flag, given, integer, number
from vllm_cosmos3.cli.versions import check_vllm
from vllm_cosmos3.errors import CheckpointError, InvalidRequest
from vllm_cosmos3.fetching import PRIVATE_MEDIA
from vllm_cosmos3.reasoner.media.limits import (
    CONNECTOR,
    DEFAULT_FPS,
    DEFAULT_FRAMES,
    FPS,
    FRAMES,
    uses_reference,
)
from vllm_cosmos3.reasoner.required_tensors import check_folder, expected_tensors
from vllm_cosmos3.reasoner.root_config import ARCHITECTURE
from vllm_cosmos3.request.fields import Spec
from vllm_cosmos3.server.command import share_beside
from vllm_cosmos3.server.options import (
    KEEP_ALIVE,
    ONE_ENGINE,
    ONE_PROCESS,
    OPTIONS,
    SHARED,
    from_mapping,
)
from vllm_cosmos3.stage.launcher import launched

TAKES_REST = TAKES_CONFIG = True

PLUGIN = "cosmos3"  # name of our entry points, which VLLM_PLUGINS can switch off
DEFAULT_PORT = 8000  # vLLM's
PORT = Spec(kind="int", low=0, high=65535, help="port to listen on; 0: any free one")
# 400 for what cannot be fetched; what the generator's routes bring along where it is served as well.
IDLE = "VLLM_HTTP_TIMEOUT_KEEP_ALIVE"
MEDIA_ERRORS = "vllm_cosmos3.server.media_errors.MediaErrors"
OF_REASONER_ALONE = (
    "vllm_cosmos3.server.http.keys.ReasonerKeys",
    "vllm_cosmos3.server.reasoner_health.ReasonerHealth",
)

# Why a flag of vLLM is on unless the user says otherwise.
_REASONS = {
    "--mm-encoder-tp-mode": "each tensor-parallel rank encodes whole pictures and clips, which needs "
    "no exchange in the vision tower",
    "--async-scheduling": "the next step is scheduled while the device computes this one",
    "--trust-request-mm-kwargs": "lets requests choose their own mm_processor_kwargs, such as fps; "
    "videos stay within {fps:g} fps and {frames} frames",
}
# Flags of vLLM that matter beside a generator, and what they are short for.
_SHORT = {
    "-asc": "--api-server-count",
    "-dp": "--data-parallel-size",
    "-tp": "--tensor-parallel-size",
}
# How flags end whose values nobody else should read, and what is shown instead.
SECRETS = ("-key", "-token", "-password", "-secret")
HIDDEN = "****"

_EPILOG = """\
Every other flag is passed on to vLLM, for example --tensor-parallel-size 4, --max-model-len 32768,
--enforce-eager (starts sooner, runs slower), --quantization fp8 (halves the language model's weights),
--allowed-local-media-path /data (for file:// URLs),
--reasoning-parser cosmos3 (moves the text between <think> and </think> to `reasoning`) or
--load-format dummy. Put the checkpoint first.

  vllm-cosmos3 serve nvidia/Cosmos3-Nano
  vllm-cosmos3 serve nvidia/Cosmos3-Super --tensor-parallel-size 4 --port 8001
  vllm-cosmos3 serve nvidia/Cosmos3-Nano --surface generator --ulysses-degree 4
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that are ours, in groups, and those of vLLM that need a word."""
    parser.epilog = "\n".join(
        [serve_generator.web_parser().format_help(), _EPILOG, _foreign_help()]
    )
    parser.usage = "vllm-cosmos3 serve CKPT [--surface reasoner|generator|both] [flags]"
    parser.add_argument(
        "checkpoint",
        metavar="CKPT",
        help="folder, repository, demo, demo-4step or demo-policy",
    )
    config_file.add_flag(parser)
    parser.add_argument(
        "--surface",
        choices=("reasoner", "generator", "both"),
        default="both",
        help="what to serve: chat, images and videos, or both on one port (default: both)",
    )
    parser.add_argument(
        "--host", metavar="ADDRESS", help="address to listen on (default: all of this machine)"
    )
    parser.add_argument(
        "--port",
        type=integer,
        default=DEFAULT_PORT,
        help="port to listen on (default: %(default)s)",
    )
    reasoner = parser.add_argument_group("reasoner")
    reasoner.add_argument(
        "--max-video-fps",
        type=number,
        default=DEFAULT_FPS,
        metavar="N",
        help="highest fps a request may sample a video at (default: %(default)g)",
    )
    reasoner.add_argument(
        "--max-video-frames",
        type=integer,
        default=DEFAULT_FRAMES,
        metavar="N",
        help="most frames decoded of one video; longer videos are subsampled evenly (default: %(default)s)",
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name, (group, spec, default) in OPTIONS.items():
        if name in SHARED:
            continue
        if group not in groups:
            title = group if group == "generator" else f"generator: {group}"
            groups[group] = parser.add_argument_group(title)
        add_server_flag(groups[group], name, spec, default)
    parser.set_defaults(rest=[])


def _foreign_help() -> str:
    help_alone = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, add_help=False, formatter_class=Help
    )
    foreign_flags.add_help(help_alone)
    return help_alone.format_help()


def run(args: argparse.Namespace) -> int:
    """Check, print the stock command, run it in this process. Returns its exit status."""
    check_vllm()
    _check_no_launcher()
    values = given(args, OPTIONS)
    _expand(args)
    PORT.checked("port", args.port)
    _check_trainers_have_a_key(values, args.rest)
    if args.surface == "generator":
        _check_port_is_free(args.host, args.port)
        _local_folder(args.checkpoint)
        return serve_generator.run(args.checkpoint, args.host, args.port, values, args.rest)
    uses_reference()  # a wrong name should stop the start here, in one line
    _check_plugin_is_on()
    for flag, value in (
        ("--max-video-fps", args.max_video_fps),
        ("--max-video-frames", args.max_video_frames),
    ):
        if isinstance(value, str) or not 1 <= value < math.inf:
            raise InvalidRequest(flag, value, "a number of at least 1")
    folder = _local_folder(args.checkpoint)
    if folder is not None and _value_of("--load-format", args.rest) != "dummy":
        check_reasoner(folder)
    _check_port_is_free(args.host, args.port)
    environment = _environment(args, private=bool(values.get("allow_private_media")))
    os.environ.update(environment)  # VLLM_PLUGINS says what may add flags
    _check_flags(args)
    if args.surface == "reasoner":
        values.pop("allow_private_media", None)  # for chat as well
    if args.surface == "both":
        if folder is None:
            weights = values.get("generator_load_format") != "dummy"
            folder = resolve(args.checkpoint, _value_of("--revision", args.rest), weights=weights)
        args.rest = beside_generator(values, folder, args.rest)
    elif values:
        name, value = next(iter(values.items()))
        possible = "left out: --surface reasoner has no generator"
        raise InvalidRequest(f"--{name.replace('_', '-')}", value, possible, "conflict")
    elif folder is None and not _given("--download-dir", args.rest):
        # vLLM would say that there is no such repository in a traceback.
        resolve(args.checkpoint, _value_of("--revision", args.rest), weights=False)

    command = stock_command(args, folder)
    shown = [f"{name}={value}" for name, value in environment.items()]
    print("vllm-cosmos3 serve: running", *shown, shlex.join(without_secrets(command)), flush=True)
    for line in reasons(command, args):
        print("vllm-cosmos3 serve:", line, flush=True)
    return _become(command)


def _environment(args: argparse.Namespace, *, private: bool) -> dict[str, str]:
    """The variables of vLLM and of our plugin in it, with ``private`` addresses or without."""
    found = (
        {"VLLM_PLUGINS": os.environ.get("VLLM_PLUGINS", PLUGIN)} if args.surface == "both" else {}
    )
    found |= {PRIVATE_MEDIA: "1"} if private else {}
    found |= {FPS: f"{args.max_video_fps:g}", FRAMES: str(args.max_video_frames)}
    found[IDLE] = os.environ.get(IDLE, str(KEEP_ALIVE))
    if not _chooses_how_to_read(args.rest):
        found["VLLM_MEDIA_CONNECTOR"] = CONNECTOR
    return found


def _check_flags(args: argparse.Namespace) -> None:
    """Refuse in one sentence what vLLM would answer with the whole of its usage."""
    from vllm_cosmos3.compat import unknown_to_serve

    unknown, flags = unknown_to_serve([args.checkpoint, *args.rest])
    if unknown:
        ours = argparse.ArgumentParser()
        add_arguments(ours)
        raise UnknownFlag(unknown[0], [*ours._option_string_actions, *flags])


def beside_generator(values: Mapping[str, Any], folder: Path, rest: list[str]) -> list[str]:
    """vLLM's flags for a server with a generator of these options.

    The reasoner gets what memory the generator leaves on the devices that they share, unless the
    user has divided it.

    Raises:
        Cosmos3Error: an option has a wrong value, or the generator cannot run here.
    """
    rest = list(rest)
    processes = _value_of("--api-server-count", rest)
    if processes not in (None, "1"):
        raise InvalidRequest("--api-server-count", processes, ONE_PROCESS)
    engines = _value_of("--data-parallel-size", rest)
    if engines not in (None, "1"):
        raise InvalidRequest("--data-parallel-size", engines, ONE_ENGINE)
    additional = _json_flag("--additional-config", rest) or {}
    given_before = additional.get("cosmos3", {})
    if not isinstance(given_before, dict):
        raise InvalidRequest("additional-config.cosmos3", given_before, "a JSON object")
    additional["cosmos3"] = {**given_before, **values}
    options = from_mapping(additional["cosmos3"])
    ranks = int(_value_of("--tensor-parallel-size", rest) or 1)
    share = share_beside(folder, root_config(folder), options, ranks)
    if share is not None and not _given("--gpu-memory-utilization", rest):
        rest += ["--gpu-memory-utilization", f"{share:.2f}"]
    return [*rest, "--additional-config", json.dumps(additional)]


def stock_command(args: argparse.Namespace, folder: Path | None) -> list[str]:
    """The ``vllm serve`` command line; what the user gave wins over our defaults."""
    from vllm_cosmos3.compat import has_serve_flag

    rest = list(args.rest)
    overrides = _json_flag("--hf-overrides", rest) or {}
    overrides.setdefault("architectures", [ARCHITECTURE])
    media = _json_flag("--media-io-kwargs", rest) or {}
    media.setdefault("video", {"num_frames": -1})
    command = ["vllm", "serve", args.checkpoint]
    if args.host is not None:
        command += ["--host", args.host]
    command += ["--port", str(args.port), "--hf-overrides", json.dumps(overrides)]
    command += ["--media-io-kwargs", json.dumps(media)]
    if not _given("--mm-encoder-tp-mode", rest):
        command += ["--mm-encoder-tp-mode", "data"]
    if not _given("--async-scheduling", rest):
        command.append("--async-scheduling")
    trust = "--trust-request-mm-kwargs"
    if not _given(trust, rest) and has_serve_flag(trust.removeprefix("--")):
        command.append(trust)
    if folder is not None and not (folder / "config.json").is_file():
        if not _given("--config-format", rest):
            command += ["--config-format", "cosmos3"]
        if not _given("--tokenizer", rest) and not (folder / "tokenizer_config.json").is_file():
            command += ["--tokenizer", str(folder / "text_tokenizer")]
    for layer in (MEDIA_ERRORS, *(OF_REASONER_ALONE if args.surface == "reasoner" else ())):
        command += ["--middleware", layer]
    return [*command, *rest]


def without_secrets(command: Sequence[str]) -> list[str]:
    """The words of a command with stars for keys, tokens and passwords: logs are read by others."""
    shown, hides = [], False
    for word in command:
        flag, equals, _ = word.partition("=")
        if flag.startswith("--"):
            hides = flag.replace("_", "-").endswith(SECRETS)
            shown.append(f"{flag}={HIDDEN}" if hides and equals else word)
        else:
            shown.append(HIDDEN if hides else word)
    return shown


def _chooses_how_to_read(rest: list[str]) -> bool:
    """Whether the operator has named a connector or a video loader."""
    video = (_json_flag("--media-io-kwargs", list(rest)) or {}).get("video")
    named = isinstance(video, dict) and "video_backend" in video
    return named or "VLLM_MEDIA_CONNECTOR" in os.environ


def reasons(command: Sequence[str], args: argparse.Namespace) -> list[str]:
    """Why the flags are there that are ours."""
    ours = [flag for flag in _REASONS if flag in command and not _given(flag, args.rest)]
    found = [f"{flag}: {_REASONS[flag]}" for flag in ours]
    limits = {"fps": args.max_video_fps, "frames": args.max_video_frames}
    return [line.format(**limits) for line in found]


def check_reasoner(folder: Path) -> None:
    """CheckpointError, in one sentence, unless ``folder`` holds a whole reasoner."""
    config = root_config(folder)
    if "quantization_config" not in config:  # stored quantized: vLLM checks those tensors
        check_folder(folder, expected_tensors(config))


def root_config(folder: Path) -> dict[str, Any]:
    """The root config.json of a checkpoint, or what it would be."""
    if (folder / "config.json").is_file():
        config = read_json(folder / "config.json")
    else:
        from vllm_cosmos3.reasoner.root_config import assemble

        config = assemble(folder)
    if "text_config" not in config:
        raise CheckpointError(
            f"{folder} is not a Cosmos 3 checkpoint: its config.json has no text_config"
        )
    return config


def _expand(args: argparse.Namespace) -> None:
    """Put what a short name stands for in its place; requests name it, or the repository."""
    short, args.checkpoint = args.checkpoint, full_name(args.checkpoint)
    flag = "--served-model-name"
    if args.checkpoint != short and not _given(flag, args.rest):
        names = [short] if is_checkpoint(Path(args.checkpoint)) else [short, args.checkpoint]
        args.rest = [flag, *names, *args.rest]


def _local_folder(checkpoint: str) -> Path | None:
    """The checkpoint as a folder, None for a repository id."""
    folder = Path(os.path.expanduser(checkpoint))  # leaves a user that nobody knows as it is
    if folder.is_dir():
        if not is_checkpoint(folder):
            raise CheckpointError(
                f"{folder} is not a Cosmos 3 checkpoint: it has no transformer/ folder"
            )
        return folder
    if folder.exists() or checkpoint.count("/") != 1 or checkpoint.startswith((".", "~", "/")):
        raise CheckpointError(
            f"{checkpoint} is neither a folder nor a repository id such as nvidia/Cosmos3-Nano"
        )
    return None


def _check_port_is_free(host: str | None, port: int) -> None:
    family = socket.AF_INET6 if host and ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host or "", port))
        except OSError as error:
            reason = error.strerror or str(error)
            if error.errno == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror):
                possible = f"an address of this machine ({reason.lower()})"
                raise InvalidRequest("--host", host, possible) from None
            raise InvalidRequest("--port", port, f"a free port ({reason.lower()})") from None


def _check_no_launcher() -> None:
    """A server starts its ranks itself: several copies would want the same port and devices."""
    place = launched()
    if place is not None and place.world_size > 1:
        possible = "unset: serve starts the ranks of its mesh itself, so start it without torchrun"
        raise InvalidRequest("WORLD_SIZE", place.world_size, possible)


def _check_trainers_have_a_key(values: Mapping[str, Any], rest: list[str]) -> None:
    """Weights are taken from nobody without a key: the routes would refuse every call."""
    method = values.get("weight_transfer")
    if method and not (_given("--api-key", rest) or os.environ.get("VLLM_API_KEY")):
        possible = "given with --api-key, or VLLM_API_KEY set"
        raise InvalidRequest("--weight-transfer", method, possible, "conflict")


def _check_plugin_is_on() -> None:
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        raise InvalidRequest("VLLM_PLUGINS", allowed, f"unset, or a list with {PLUGIN} in it")


def _become(command: list[str]) -> int:
    """Run vLLM's own command line in this process, so that signals and status are its own."""
    from vllm.entrypoints.cli.main import main

    sys.argv = command
    main()
    return 0


def _given(flag: str, rest: list[str]) -> bool:
    """Whether the user set a flag himself, in either spelling or as its negation."""
    names = {flag, flag.replace("--", "--no-", 1)}
    return any(word.split("=", 1)[0].replace("_", "-") in names for word in rest)


def _value_of(flag: str, rest: list[str]) -> str | None:
    """The value the user gave to a flag, by its long name or its short one, None if he did not."""
    for index, word in enumerate(rest):
        name, equals, value = word.partition("=")
        if _SHORT.get(name, name.replace("_", "-")) == flag:
            return value if equals else next(iter(rest[index + 1 :]), None)
    return None


def _json_flag(flag: str, rest: list[str]) -> dict[str, Any] | None:
    """Take a flag with a JSON object out of ``rest``; None if it is not there."""
    for index, word in enumerate(rest):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") != flag:
            continue
        text = value if equals else next(iter(rest[index + 1 :]), "")
        del rest[index : index + (1 if equals else 2)]
        try:
            parsed = json.loads(text)
        except ValueError:
            parsed = None
        if not isinstance(parsed, dict):
            raise InvalidRequest(flag, text, "a JSON object")
        return parsed
    return None
