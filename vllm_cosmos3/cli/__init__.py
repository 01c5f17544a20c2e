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
from collections.abc import Sequence
from typing import Any

from vllm_cosmos3.errors import Cosmos3Error, InvalidRequest
from vllm_cosmos3.version import __version__

COMMANDS = {
    "serve": "serve both surfaces, or one, behind an OpenAI-compatible API",
    "generate": "make images and videos from a prompt, offline",
    "upsample": "let the reasoner write a structured prompt for the generator",
    "make-checkpoint": "write a small random checkpoint in the published layout",
    "plan": "print the memory per GPU for a checkpoint and a mesh",
    "doctor": "check this machine and print what to fix",
}


def _parser(
    chosen: str | None,
) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser | None, Any]:
    """The parser of the command, and of the chosen subcommand with its module."""
    parser = argparse.ArgumentParser(
        prog="vllm-cosmos3", description="Serve NVIDIA Cosmos 3 on stock vLLM."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    found, module = None, None
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}."
        )
        if name == chosen:
            module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
            module.add_arguments(sub)
            found = sub
    return parser, found, module


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand. Returns its exit status.

    A user's mistake is one line and status 2; a disk that is full, or whatever else the system
    refuses, is one line and status 1.
    """
    argv = sys.argv[1:] if argv is None else argv
    _write_anything()
    chosen = next((a for a in argv if not a.startswith("-")), None)
    parser, sub, module = _parser(chosen)
    args, rest = parser.parse_known_args(argv)
    if rest:
        if not getattr(module, "TAKES_REST", False):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        args.rest = rest
    try:
        status = int(module.run(args))
        sys.stdout.flush()
        return status
    except InvalidRequest as error:
        assert sub is not None  # as its module has run
        return _failed(args.command, with_flags(error, sub, argv), 2)
    except Cosmos3Error as error:
        return _failed(args.command, error, 2)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our output has gone, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 141
    except OSError as error:
        return _failed(args.command, _reason(error), 1)


def with_flags(
    error: InvalidRequest, parser: argparse.ArgumentParser, argv: Sequence[str]
) -> InvalidRequest:
    """The same error with flags for fields, as they were typed or else as they are in the help."""
    if not re.fullmatch(r"[\w.\[\] ]+", error.field):  # it says where it is itself
        return error
    typed = {word.split("=", 1)[0] for word in argv}
    flags = {}
    for action in parser._actions:
        long = [option for option in action.option_strings if option.startswith("--")]
        if long:
            flags[action.dest] = next((option for option in long if option in typed), long[0])

    def flag(word: re.Match[str]) -> str:
        same = f"--{word[0].replace('_', '-')}"
        return flags.get(word[0], same if same in typed else word[0])

    field = re.sub(r"^\w+|(?<= )\w+", flag, error.field)
    return InvalidRequest(field, error.value, error.possible, error.code)


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
