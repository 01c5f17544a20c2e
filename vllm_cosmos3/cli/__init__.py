"""The ``vllm-cosmos3`` command: a table of subcommands, each in a module of its own.

A subcommand module has ``add_arguments(parser)`` and ``run(args) -> int``. It is imported only when
it is called, so that ``--help`` and ``doctor`` answer at once even where vLLM is broken.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from vllm_cosmos3.cli import foreign_flags
from vllm_cosmos3.cli.config_file import expanded
from vllm_cosmos3.cli.flags import UNIT_EXAMPLES, Help, Parser, UnknownFlag
from vllm_cosmos3.errors import Cosmos3Error, InvalidRequest, did_you_mean
from vllm_cosmos3.imports import end_at_once
from vllm_cosmos3.version import __version__

# A field in a sentence, no part of a file's name, with the sign before its value.
NAME = re.compile(r"(?<![\w./-])([a-z]+(?:_[a-z0-9]+)+)(?![\w/]|\.\w)(=True\b|=)?")
COMMANDS = {
    "serve": "start an OpenAI-compatible server (chat, images, videos)",
    "generate": "make images and videos from a prompt, offline",
    "upsample": "expand a short prompt into the structured JSON prompt the generator was trained on",
    "compare": "measure what FP8 and the step cache change, on your prompts",
    "plan": "estimate GPU memory before loading anything",
    "doctor": "check this machine and print what to fix",
    "merge-lora": "write a checkpoint with LoRA adapters merged into its generator",
    "make-checkpoint": "write a small random checkpoint in the published layout",
    "completion": "print a completion script for a shell",
}


def whole_parser(chosen: Iterable[str]) -> argparse.ArgumentParser:
    """The parser of the command, with the flags of the ``chosen`` subcommands."""
    parser = argparse.ArgumentParser(
        prog="vllm-cosmos3", description="Serve NVIDIA Cosmos 3 on stock vLLM."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=Parser
    )
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            formatter_class=Help,
            allow_abbrev=False,  # a shorter word may be a flag of a later version, or of vLLM
        )
        if name in chosen:
            _module(name).add_arguments(sub)
    return parser


def _module(command: str) -> Any:
    return importlib.import_module(f"{__name__}.{command.replace('-', '_')}")


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand. Returns its exit status.

    A user's mistake is one line and status 2; a disk that is full, or whatever else the system
    refuses, is one line and status 1.
    """
    argv = sys.argv[1:] if argv is None else argv
    _write_anything()
    end_at_once()
    chosen = next((a for a in argv if not a.startswith("-")), None)
    if chosen is not None and chosen not in COMMANDS:
        near = did_you_mean(chosen, COMMANDS)
        hint = near or f"the commands are {', '.join(COMMANDS)}"
        print(f"vllm-cosmos3: unknown command {chosen}; {hint}", file=sys.stderr)
        return 2
    parser = whole_parser([] if chosen is None else [chosen])
    if chosen is None:
        parser.parse_args(argv)
    assert chosen is not None  # else argparse has answered
    module, sub = _module(chosen), subparser(parser, chosen)
    try:
        words, notes = foreign_flags.translated(chosen, argv[argv.index(chosen) + 1 :])
        for note in notes:
            print(f"vllm-cosmos3 {chosen}: {note}", file=sys.stderr)
        if getattr(module, "TAKES_CONFIG", False):
            words = expanded(words, sub)
        args, rest = parser.parse_known_args([*argv[: argv.index(chosen) + 1], *words])
        if rest and not getattr(module, "TAKES_REST", False):
            raise UnknownFlag(rest[0], sub._option_string_actions)
        args.rest = rest
        status = int(module.run(args))
        sys.stdout.flush()
        return status
    except InvalidRequest as error:
        return _failed(chosen, with_flags(error, sub, argv), 2)
    except Cosmos3Error as error:
        return _failed(chosen, error, 2)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our output has gone, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 141
    except OSError as error:
        return _failed(chosen, _reason(error), 1)


def subparser(parser: argparse.ArgumentParser, command: str) -> argparse.ArgumentParser:
    """The parser of one subcommand."""
    assert parser._subparsers is not None
    choices: Any = parser._subparsers._group_actions[0].choices
    found: argparse.ArgumentParser = choices[command]
    return found


def with_flags(
    error: InvalidRequest, parser: argparse.ArgumentParser, argv: Sequence[str]
) -> InvalidRequest:
    """The same error with flags for fields, as they were typed or else as they are in the help.

    In what is possible these are names with an underscore: others may be words of a sentence. Where a
    text was given, the units that the flag reads are possible, too.
    """
    if not re.fullmatch(r"[\w.\[\] ]+", error.field):  # it says where it is itself
        return error
    typed = {word.split("=", 1)[0] for word in argv}
    flags, examples = {}, ""
    for action in parser._actions:
        long = [option for option in action.option_strings if option.startswith("--")]
        long = long or re.findall(r"^\w+", str(action.metavar or action.dest))  # of an argument
        chosen = next((option for option in long if option in typed), None)
        if chosen or action.dest not in flags:  # which several flags may stand for
            flags[action.dest] = chosen or long[0]
        if action.dest == error.field and isinstance(error.value, str):
            examples = UNIT_EXAMPLES.get(action.type, "")

    def flag(word: re.Match[str]) -> str:
        same = f"--{word[0].replace('_', '-')}"
        return flags.get(word[0], same if same in typed else word[0])

    def told(name: re.Match[str]) -> str:
        if name[1] not in flags:
            return name[0]
        return flags[name[1]] + (" " if name[2] == "=" else "")

    field = re.sub(r"^\w+|(?<= )\w+", flag, error.field)
    possible = re.sub(NAME, told, error.possible)
    possible = f"{examples}, or {possible}" if examples else possible
    return InvalidRequest(field, error.value, possible, error.code)


def _failed(command: str, message: object, status: int) -> int:
    print(f"vllm-cosmos3 {command}: {message}", file=sys.stderr)
    return status


def _reason(error: OSError) -> str:
    reason = (error.strerror or str(error) or type(error).__name__).lower()
    return reason if error.filename is None else f"{os.fsdecode(error.filename)}: {reason}"


def _write_anything() -> None:
    """Let output that cannot be encoded, such as odd names of files, be escaped: it is for people."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
