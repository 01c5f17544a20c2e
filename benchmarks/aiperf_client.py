"""The same load through NVIDIA's AIPerf, which lives in an environment of its own.

AIPerf draws its own clips with ffmpeg, which it expects beside itself or on the PATH.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path

from clips import ClipShape
from load import Body


def profile(
    program: Path,
    url: str,
    *,
    model: str,
    tokenizer: str,
    media: str,
    shape: ClipShape,
    fps: float | None,
    input_tokens: int,
    output_tokens: int,
    concurrency: int,
    requests: int,
    warmup: int,
) -> Body:
    """Run ``aiperf profile`` once and return its figures under the names of ``load.summary``."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(str(program), "profile", "--model", model, "--tokenizer", tokenizer, "--url", url),
            *("--endpoint-type", "chat", "--endpoint", "/v1/chat/completions", "--streaming"),
            *("--synthetic-input-tokens-mean", str(input_tokens)),
            *("--synthetic-input-tokens-stddev", "0"),
            *("--output-tokens-mean", str(output_tokens), "--output-tokens-stddev", "0"),
            *("--extra-inputs", "ignore_eos:true"),
            *("--extra-inputs", f"min_tokens:{output_tokens}"),
            *_media_options(media, shape, fps),
            *("--num-dataset-entries", str(requests), "--random-seed", "0"),
            *("--concurrency", str(concurrency), "--request-count", str(requests)),
            *("--warmup-request-count", str(warmup)),
            *("--use-server-token-count", "--ui", "none", "--artifact-dir", folder),
        ]
        path = os.pathsep.join([str(program.parent), os.environ.get("PATH", "")])
        # AIPerf 0.13 mistakes a local tokenizer folder for a repository name when this is set
        env = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | {"PATH": path}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        report = Path(folder) / "profile_export_aiperf.json"
        if done.returncode != 0 or not report.exists():
            raise SystemExit(f"aiperf ended with status {done.returncode}:\n{done.stdout[-2000:]}")
        return _figures(json.loads(report.read_text()))


def _media_options(media: str, shape: ClipShape, fps: float | None) -> list[str]:
    size = {"width": shape.width, "height": shape.height}
    if media == "video":
        options = {**size, "duration": shape.seconds, "fps": f"{fps:g}", "batch-size": 1}
        options |= {"synth-type": "noise", "format": "mp4", "codec": "libx264"}
        return [text for name, value in options.items() for text in (f"--video-{name}", str(value))]
    if media == "image":
        return [
            *("--image-width-mean", str(shape.width), "--image-height-mean", str(shape.height)),
            *("--image-batch-size", "1"),
        ]
    return []


def _figures(report: Body) -> Body:
    def value(metric: str, statistic: str = "avg") -> float:
        record = report.get(metric)
        return round(record[statistic], 3) if isinstance(record, dict) else 0.0

    def percentiles(metric: str) -> Body:
        if not isinstance(report.get(metric), dict):
            return {}
        names = {"mean": "avg", "p50": "p50", "p90": "p90", "p99": "p99"}
        return {ours: value(metric, theirs) for ours, theirs in names.items()}

    failed = round(value("error_request_count"))
    return {
        "requests": round(value("request_count")) + failed,
        "errors": failed,
        "error_messages": [str(error)[:200] for error in report.get("error_summary") or []],  # type: ignore[attr-defined]
        "seconds": value("benchmark_duration"),
        "requests_per_second": value("request_throughput"),
        "output_tokens_per_second": value("output_token_throughput"),
        "ttft_ms": percentiles("time_to_first_token"),
        "itl_ms": percentiles("inter_token_latency"),
        "latency_ms": percentiles("request_latency"),
        "prompt_tokens": value("usage_prompt_tokens"),
        "output_tokens": value("usage_completion_tokens"),
    }
