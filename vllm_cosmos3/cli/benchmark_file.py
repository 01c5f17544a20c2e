"""``benchmark.json``: the timings of a run under the names of the Cosmos Framework."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from vllm_cosmos3.files import write_text

NAME = "benchmark.json"
# The framework's name of each timing, and which phases of ours it spans.
PHASES = {
    "OmniInference.prepare_inputs": ("text", "vae_encode"),
    "OmniMoTModel.generate_samples_from_batch": ("denoise",),
    "OmniMoTModel.decode": ("vae_decode",),
    "OmniMoTModel.decode_sound": ("sound",),
    "OmniMoTModel.generate_reasoner_text": ("answer",),
    "OmniInference.generate_batch": ("total", "answer"),
}


def write_benchmark(out: Path, samples: Sequence[Mapping[str, float]]) -> None:
    """Write ``out/benchmark.json``: the seconds of all samples, and their averages.

    The first of several samples is left out of an average: it is the one that warms up.
    """
    found: dict[str, list[float]] = {}
    for timings in samples:
        for name, phases in PHASES.items():
            if spanned := [timings[phase] for phase in phases if phase in timings]:
                found.setdefault(name, []).append(sum(spanned))
    warm = {name: seconds[1:] or seconds for name, seconds in found.items()}
    average = {name: sum(seconds) / len(seconds) for name, seconds in warm.items()}
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"all": found, "average": average}, indent=2, sort_keys=True)
    write_text(out / NAME, text + "\n")
