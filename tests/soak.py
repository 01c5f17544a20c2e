"""Kill a worker, let the stage recover, run a request; many times. ``make soak`` runs it.

    python tests/soak.py [--rounds 50] [--ranks 2]

Each round kills a worker with SIGKILL in the middle of a step. The request must fail with
``worker_died``, one that waits must succeed. Prints the seconds to recovery and, at the end, what
there is more of than after the first round: processes, open files, shared memory. Status 1 if
anything is.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import sys
import time
from contextlib import suppress
from pathlib import Path

from ranks import processes_below, remaining, segments_of
from toy_plan import ToyPlan

from vllm_cosmos3.engine_options import EngineConfig
from vllm_cosmos3.errors import WorkerDied
from vllm_cosmos3.stage.client import StageClient
from vllm_cosmos3.stage.config import StageConfig

SETTLING_SECONDS = 60.0  # until what is more than after the first round counts as left behind


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=2)
    args = parser.parse_args()
    engine = EngineConfig(model=Path("/"), ulysses_degree=args.ranks)
    client = StageClient(StageConfig(engine=engine, stage="toy_stage:Toy", grace=0.5))
    client.wait_ready(300)
    seconds, counts = [], []
    pids: set[int] = set()
    segments: set[Path] = set()
    for number in range(args.rounds):
        seconds.append(kill_and_recover(client, args.ranks))
        stage = processes_below(os.getpid())
        pids |= stage
        segments |= segments_of(stage)
        counts.append((len(stage), open_files(stage)))
        print(f"round {number + 1}: {seconds[-1]:.2f} s, processes and files {counts[-1]}")
    end = time.monotonic() + SETTLING_SECONDS
    while more(counts) and time.monotonic() < end:  # the last ones may be about to go
        time.sleep(0.1)
        stage = processes_below(os.getpid())
        counts[-1] = len(stage), open_files(stage)
    client.close()
    left = remaining(pids, segments)
    print(
        f"{args.rounds} rounds on {args.ranks} ranks: recovery {statistics.mean(seconds):.2f} s on"
    )
    print(f"average, {max(seconds):.2f} s at most; after the first round {counts[0]} processes and")
    print(f"files, after the last {counts[-1]}; left behind: {left or 'nothing'}")
    return int(bool(left) or more(counts))


def more(counts: list[tuple[int, int]]) -> bool:
    """Whether there are more processes in the end, or more files."""
    return any(last > first for first, last in zip(counts[0], counts[-1], strict=True))


def kill_and_recover(client: StageClient, ranks: int) -> float:
    """Seconds from the kill to the next result."""
    victim = client.submit(ToyPlan(steps=100_000, seconds=0.01), seconds=1000.0)
    while victim.progress is None or victim.progress.step < 3:
        time.sleep(0.01)
    waiting = client.submit(ToyPlan(steps=2), seconds=1000.0)
    probe = client.submit(ToyPlan(steps=1)).result(60)
    os.kill(random.choice(probe.pids), signal.SIGKILL)
    start = time.monotonic()
    try:
        victim.result(120)
    except WorkerDied:
        pass
    else:
        raise AssertionError("the victim has survived")
    assert len(waiting.result(120).pids) == ranks
    return time.monotonic() - start


def open_files(pids: set[int]) -> int:
    count = 0
    for pid in pids | {os.getpid()}:
        with suppress(FileNotFoundError):  # it has just ended
            count += len(os.listdir(f"/proc/{pid}/fd"))
    return count


if __name__ == "__main__":
    sys.exit(main())
