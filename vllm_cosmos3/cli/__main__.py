"""``python -m vllm_cosmos3.cli`` is the ``vllm-cosmos3`` command; torchrun starts it that way."""

import sys

from vllm_cosmos3.cli import main

sys.exit(main())
