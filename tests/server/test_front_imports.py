"""What the process in front of the generator imports: nothing of vLLM, whose ranks have processes of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = "print(*sorted({'vllm', 'torch', 'torchvision', 'cv2', 'openai', 'ray', 'scipy'} & sys.modules.keys()))"
FRONT = f"""
import sys
from pathlib import Path
import numpy as np
from vllm_cosmos3 import media
from vllm_cosmos3.cli import serve, serve_generator
from vllm_cosmos3.devices import devices
from vllm_cosmos3.request.prompts import encode, load_tokenizer
from vllm_cosmos3.server import command
from vllm_cosmos3.server.app import Listen, make_app
from vllm_cosmos3.server.guardrails import Guardrails
from vllm_cosmos3.server.jobs.service import Service
from vllm_cosmos3.server.memory_split import sized
from vllm_cosmos3.server.options import Options
folder, options = Path(sys.argv[1]), Options(guardrails="off")
sizing, guardrails = sized(folder, options, devices().type), Guardrails(options)
media.cover_crop(np.zeros((1, 64, 80, 3), np.uint8), height=64, width=64)  # of its size: nothing is resized
encode("a boat", load_tokenizer(folder), system="You are", limit=64)
make_app(lambda: Service(sizing, ("tiny",), options, guardrails), Listen()).openapi()
{HEAVY}
"""
COMMANDS = f"""
import sys
from vllm_cosmos3.cli import COMMANDS, main, whole_parser
whole_parser(COMMANDS).format_help()
sys.stdout, output = sys.stderr, sys.stdout
assert main(["plan", sys.argv[1], "--gpu-memory", "1000"]) == 0
sys.stdout = output
{HEAVY}
"""


@pytest.mark.parametrize("program", [FRONT, COMMANDS], ids=["front", "commands"])
def test_neither_vllm_nor_torch(program: str, tiny_checkpoint: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program, tiny_checkpoint],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr
