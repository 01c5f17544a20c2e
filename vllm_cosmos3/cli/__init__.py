"""The ``vllm-cosmos3`` command: a table of subcommands, each in a module of its own.

A subcommand module has ``add_arguments(parser)`` and ``run(args) -> int``. It is imported only when
it is called, so that ``--help`` and ``doctor`` answer at once even where vLLM is broken.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from vllm_cosmos3.errors import Cosmos3Error
from vllm_cosmos3.version import __version__

COMMANDS = {
    "serve": "serve both surfaces, or one, behind an OpenAI-compatible API",
    "generate": "make images and videos from a prompt, offline",
    "upsample": "let the reasoner write a structured prompt for the generator",
    "make-checkpoint": "write a small random checkpoint in the published layout",
    "plan": "print the memory per GPU for a checkpoint and a mesh",
    "doctor": "check this machine and print what to fix",
}


def _parser(chosen: str | None) -> tuple[argparse.ArgumentParser, object]:
    parser = argparse.ArgumentParser(
        prog="vllm-cosmos3", description="Serve NVIDIA Cosmos 3 on stock vLLM."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    module: object = None
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}."
        )
        if name == chosen:
            module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
            module.add_arguments(sub)
    return parser, module


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand. Returns its exit status; a user's mistake is one line and status 2."""
    argv = sys.argv[1:] if argv is None else argv
    chosen = next((a for a in argv if not a.startswith("-")), None)
    parser, module = _parser(chosen)
    args, rest = parser.parse_known_args(argv)
    if rest:
        if not getattr(module, "TAKES_REST", False):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        args.rest = rest
    try:
        status = int(module.run(args))  # type: ignore[attr-defined]
        sys.stdout.flush()
        return status
    except Cosmos3Error as error:
        print(f"vllm-cosmos3 {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our output has gone, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 141
