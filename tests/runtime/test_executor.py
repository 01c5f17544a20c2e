"""The executor on real worker processes: calls, every kind of failure, and what is left behind."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from ranks import in_new_process
from toy_stage import ToyPlan, ToyResult

from vllm_cosmos3.config import EngineConfig, ParallelConfig
from vllm_cosmos3.errors import (
    CheckpointError,
    Cosmos3Error,
    DeadlineExceeded,
    InvalidRequest,
    OutOfMemory,
    WorkerDied,
)
from vllm_cosmos3.runtime.executor import StageExecutor, check_backend
from vllm_cosmos3.runtime.worker import StageConfig


def stage(
    cfg: int = 1, ulysses: int = 1, tp: int = 1, *, model: Path = Path("/"), backend: str = "mp"
) -> StageConfig:
    parallel = ParallelConfig(
        cfg_parallel_size=cfg, ulysses_degree=ulysses, tensor_parallel_size=tp
    )
    engine = EngineConfig(model=model, device="cpu", parallel=parallel)
    return StageConfig(engine=engine, stage="toy_stage:Toy", backend=backend, timeout=60, grace=0.5)


def run(executor: StageExecutor, plan: ToyPlan, *, save: Path | None = None, timeout: float = 60):
    """One request through all calls; the result of rank 0."""
    executor.call("encode", "job", plan, timeout=timeout)
    for _ in range(plan.steps):
        executor.call("step", "job", timeout=timeout)
    executor.call("decode", "job", timeout=timeout)
    return executor.call("finish", "job", save, timeout=timeout)[0]


def own_processes() -> set[int]:
    """Processes below this one, at any depth."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if fields[0] != "Z":
            parents[int(entry.name)] = int(fields[1])
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {os.getpid()}


def one_request(shape: tuple[int, int, int], folder: Path) -> tuple[ToyResult, str]:
    executor = StageExecutor(stage(*shape))
    executor.start()
    result = run(executor, ToyPlan(steps=2))
    saved = run(executor, ToyPlan(steps=2), save=folder / "total")
    executor.close()
    executor.close()
    return result, saved[0].read_text()


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 1), (1, 2, 2)])
def test_a_request_through_all_calls(shape: tuple[int, int, int], tmp_path: Path) -> None:
    result, saved = in_new_process(one_request, shape, tmp_path)
    cfg, ulysses, tp = shape
    world = cfg * ulysses * tp
    assert result.total == 2 * sum(n * (n - 1) // 2 for n in (world, cfg, ulysses, tp))
    assert len(set(result.pids)) == world
    assert saved == str(result.total)


FAULTS = {
    # fault: (error, words in it, whether the same workers go on)
    "all": (Cosmos3Error, "step failed: RuntimeError: all ranks fail", True),
    "invalid": (InvalidRequest, "prompt is '', must be text", True),
    "memory": (OutOfMemory, "fewer frames", True),
    "memory one": (OutOfMemory, "fewer frames", False),
    "one": (Cosmos3Error, "only the last rank fails", False),
    "hang": (DeadlineExceeded, "step got no answer in time from rank 0, 1", False),
    "kill": (WorkerDied, "a worker process ended in step", False),
}


def fail_and_go_on(fault: str, timeout: float) -> tuple[Cosmos3Error, bool, bool]:
    executor = StageExecutor(stage(1, 2, 1))
    executor.start()
    before = run(executor, ToyPlan()).pids
    try:
        run(executor, ToyPlan(faults={"step 1": fault}), timeout=timeout)
    except Cosmos3Error as error:
        caught = error
    healthy = executor.healthy
    if healthy:
        executor.call("drop", "job")
    else:
        executor.restart()
    after = run(executor, ToyPlan()).pids
    executor.close()
    return caught, healthy, set(before) == set(after)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_reported_and_the_next_request_works(fault: str) -> None:
    kind, words, lives = FAULTS[fault]
    timeout = 2.0 if fault == "hang" else 60.0
    error, healthy, same_workers = in_new_process(fail_and_go_on, fault, timeout)
    assert type(error) is kind
    assert words in str(error)
    assert healthy == same_workers == lives


def start_without_weights() -> set[int]:
    executor = StageExecutor(stage(1, 2, 1, model=Path("/nowhere")))
    with pytest.raises(CheckpointError, match="/nowhere is missing"):
        executor.start()
    with pytest.raises(WorkerDied):
        executor.call("ping", 1)
    return own_processes()


def test_an_error_of_loading_reaches_the_caller() -> None:
    left = in_new_process(start_without_weights)
    assert len(left) <= 1  # multiprocessing's resource tracker stays with its process


def in_this_process() -> tuple[ToyResult, int]:
    executor = StageExecutor(stage(backend="uni"))
    for _ in range(2):
        executor.start()
        result = run(executor, ToyPlan(steps=2))
        with pytest.raises(InvalidRequest):
            run(executor, ToyPlan(faults={"decode": "invalid"}))
        assert executor.healthy
        executor.close()
    return result, os.getpid()


def test_one_rank_can_run_in_the_calling_process() -> None:
    result, pid = in_new_process(in_this_process)
    assert result.pids == (pid,)


def start_and_stay(pipe_path: Path) -> None:
    executor = StageExecutor(stage(1, 2, 2))
    executor.start()
    executor.call("encode", "job", ToyPlan(faults={"step 0": "hang"}))
    pipe_path.write_text(" ".join(map(str, own_processes())))
    os.kill(os.getpid(), signal.SIGKILL)


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    shared = set(os.listdir("/dev/shm"))
    with pytest.raises(AssertionError, match="the process died"):
        in_new_process(start_and_stay, tmp_path / "pids")
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) >= 4
    deadline = time.monotonic() + 20

    def left() -> set[str]:
        alive = {str(pid) for pid in pids if Path(f"/proc/{pid}").exists()}
        return alive | (set(os.listdir("/dev/shm")) - shared)

    while left() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left()


def kill_and_recover(rounds: int) -> list[tuple[int, int, int]]:
    """Processes, open files and shared segments after each round."""
    executor = StageExecutor(stage(1, 2, 1))
    executor.start()
    counts = []
    for _ in range(rounds):
        with pytest.raises(WorkerDied):
            run(executor, ToyPlan(faults={"step 1": "kill"}))
        executor.restart()
        assert run(executor, ToyPlan()).total == 6
        files = len(os.listdir("/proc/self/fd"))
        counts.append((len(own_processes()), files, len(os.listdir("/dev/shm"))))
    executor.close()
    return counts


def test_rounds_of_kill_and_recover_leave_nothing_behind() -> None:
    counts = in_new_process(kill_and_recover, 5)
    assert counts[-1] == counts[1]


@pytest.mark.parametrize(
    ("backend", "shape", "message"),
    [
        ("ray", (1, 1, 2), "mp on the CPU: vLLM's Ray executor needs GPUs"),
        ("uni", (1, 2, 1), "mp or ray for 2 ranks"),
        ("external_launcher", (1, 2, 1), "used under torchrun --nproc_per_node 2"),
    ],
)
def test_impossible_backends_are_refused(
    backend: str, shape: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        check_backend(stage(*shape, backend=backend))
    assert message in str(refusal.value)
