"""``python -m vllm_cosmos3`` is the ``vllm-cosmos3`` command."""

import sys

from vllm_cosmos3.cli import main

sys.exit(main())
