"""``vllm-cosmos3 completion``: completion of commands and flags for a shell, written by shtab."""

from __future__ import annotations

import argparse

SHELLS = ("bash", "zsh", "tcsh")
FILES = ("FILE", "DIR", "FILE|JSON", "FILE.yaml", "FILE.safetensors", "MODEL", "CKPT")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="the shell to complete in")
    parser.epilog = """\
examples:
  eval "$(vllm-cosmos3 completion bash)"
  vllm-cosmos3 completion zsh > ~/.zfunc/_vllm-cosmos3
"""


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    import shtab

    from vllm_cosmos3.cli import COMMANDS, subparser, whole_parser

    parser = whole_parser(COMMANDS)
    for name in COMMANDS:
        for action in subparser(parser, name)._actions:
            if action.metavar in FILES:  # shtab reads the attribute
                files = shtab.DIRECTORY if action.metavar == "DIR" else shtab.FILE
                action.complete = files  # type: ignore[attr-defined]
    print(shtab.complete(parser, args.shell))
    return 0
