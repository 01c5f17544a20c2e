"""What phyai's scripts do beyond their flags, for commands that name the checkpoint as they do.

Their prompt where none is given, and the names of their results: ``--out`` is a prefix there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PROMPT = "A red sports car driving along a coastal road at sunset."
# With one of these there is something to say that only the user knows.
ASKED = ("prompt", "prompt_token_ids", "image", "video", "action_mode")


def with_prompt(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a request, with phyai's prompt if they say nothing of what to show."""
    if any(name in fields for name in ASKED):
        return dict(fields)
    print(f"prompt: {PROMPT}", file=sys.stderr)
    return {**fields, "prompt": PROMPT}


def name_results(out: Path, files: Sequence[Path]) -> None:
    """Links to the files under the names that phyai's scripts give them: OUT.mp4, OUT_action.json."""
    for file in files:
        link = out.with_name(out.name + file.name.removeprefix("vision"))
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(file, link.parent))
