"""Batch files at scale: many tiny records through ``vllm-cosmos3 generate --input``, with or without Ray.

    python benchmarks/batches.py CKPT --records 2000 --kills 2 -- --ray

With ``--kills N`` the command is killed with SIGKILL N times on its way, and resumed. What follows
``--`` goes to the command. Prints records an hour with and without the start, and the memory of the
command's process (the driver, with Ray) while it runs: after a tenth of the records, in the middle and
at the end. Then the index is compared with the records.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

POLL_SECONDS = 0.5
RECORD = {"size": "64x64", "num_steps": 1, "guidance": 1, "num_frames": 1}


def main() -> None:
    ours, _, flags = " ".join(sys.argv[1:]).partition(" -- ")
    args = _parser().parse_args(ours.split())
    with TemporaryDirectory() as folder:
        file, out = Path(folder) / "records.jsonl", Path(folder) / "out"
        lines = (
            json.dumps(RECORD | {"name": f"r{n}", "prompt": f"boat number {n}"})
            for n in range(args.records)
        )
        file.write_text("\n".join(lines))
        command = [sys.executable, "-m", "vllm_cosmos3", "generate", args.checkpoint]
        command += ["--input", str(file), "--out", str(out), "--keep-going", *flags.split()]
        begun = time.perf_counter()
        memory: list[tuple[int, float]] = []
        made = 0  # by the last process, which was not killed
        for number in range(args.kills + 1):
            before, more = _done(out), ["--resume"] if number else []
            until = args.records * (number + 1) // (args.kills + 1)
            last = number == args.kills
            with subprocess.Popen([*command, *more]) as process:
                first, memory = 0.0, []
                while process.poll() is None:
                    time.sleep(POLL_SECONDS)
                    done = _done(out)
                    if done > before and not first:
                        first, made = time.perf_counter(), args.records - done
                    memory.append((done, _resident(process.pid)))
                    if done >= until and not last:
                        process.kill()
        end = time.perf_counter()
        left = [path.name for path in out.glob(".*")] + [path.name for path in out.rglob("*.part")]
        index = [json.loads(line) for line in (out / "index.jsonl").read_text().splitlines()]
        good = {line["name"] for line in index if line["status"] == "success"}
    print(f"{len(good)} of {args.records} records in the index, {len(index)} lines; left: {left}")
    print(f"{args.records / (end - begun) * 3600:,.0f} records an hour with the start")
    print(f"{made / (end - first) * 3600:,.0f} records an hour from the first one on")
    start, whole = memory[0][0], args.records
    for share in (0.1, 0.5, 0.9):
        wanted = start + (whole - start) * share
        found = [mib for done, mib in memory if done >= wanted and mib]
        print(f"{found[0]:,.0f} MiB in the command's process at {share:.0%} of its records")


def _done(out: Path) -> int:
    """How many records have a folder; with WebDataset they go again."""
    return len(list(out.glob("r*/"))) if out.is_dir() else 0


def _resident(pid: int) -> float:
    """The resident memory of a process in MiB, 0 if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    lines = [line for line in status.splitlines() if line.startswith("VmRSS:")]
    return int(lines[0].split()[1]) / 1024 if lines else 0.0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--records", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=0)
    return parser


if __name__ == "__main__":
    main()
