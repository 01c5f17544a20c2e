"""The executor on real worker processes: calls, every kind of failure, and what is left behind."""

from __future__ import annotations

import ast
import multiprocessing
import os
import signal
import time
from importlib.util import find_spec
from inspect import getsource, signature
from multiprocessing.connection import Connection
from operator import le
from pathlib import Path

import pytest
from generators import eventually
from limits import HANG
from ranks import in_new_process, processes_below, remaining, segments_of
from toy_plan import ToyPlan, ToyResult, stage
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from vllm_cosmos3.errors import (
    CheckpointError,
    Cosmos3Error,
    DeadlineExceeded,
    InvalidRequest,
    OutOfMemory,
    WorkerDied,
)
from vllm_cosmos3.stage.executor import StageExecutor
from vllm_cosmos3.stage.launcher import check_backend
from vllm_cosmos3.stage.worker import end_with_parent


def run(executor: StageExecutor, plan: ToyPlan, *, save: Path | None = None):
    """One request through all calls; the result of rank 0. Nobody waits long for a step that hangs."""
    executor.call("encode", "job", plan)
    for step in range(plan.steps):
        hangs = plan.faults.get(f"step {step}") == "hang"
        executor.call("step", "job", timeout=1.0 if hangs else None)
    executor.call("decode", "job")
    return executor.call("finish", "job", save)[0]


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


def waiting() -> float:
    """Seconds of the processor that waiting for a call of two seconds takes."""
    executor = StageExecutor(stage(1, 1, 1))
    executor.start()
    executor.call("encode", "job", ToyPlan(steps=1, seconds=2.0))
    before = time.thread_time()
    executor.call("step", "job")
    after = time.thread_time()
    executor.close()
    return after - before


def test_nobody_looks_without_a_pause() -> None:
    """As vLLM's reader does for a second after each message: on a CPU the ranks need that core."""
    assert in_new_process(waiting) < 0.5


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


def fail_and_go_on(fault: str, grace: float) -> tuple[Cosmos3Error, bool, bool]:
    executor = StageExecutor(stage(1, 2, 1, grace=grace))
    executor.start()
    before = run(executor, ToyPlan()).pids
    try:
        run(executor, ToyPlan(faults={"step 1": fault}))
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
    grace = 0.5 if fault in ("one", "memory one") else HANG  # for ranks that wait in a collective
    error, healthy, same_workers = in_new_process(fail_and_go_on, fault, grace)
    assert type(error) is kind
    assert words in str(error)
    assert healthy == same_workers == lives


def death_that_vllm_does_not_notice() -> tuple[Cosmos3Error, bool, bool]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MultiprocExecutor, "start_worker_monitor", lambda _: None)
        return fail_and_go_on("kill", 0.5)


def test_a_death_is_told_from_the_failure_of_its_collective() -> None:
    """However late vLLM's thread is that looks for deaths: the other rank fails at once."""
    error, healthy, same_workers = in_new_process(death_that_vllm_does_not_notice)
    assert (type(error), str(error)) == (WorkerDied, "a worker process ended in step")
    assert not healthy
    assert not same_workers


def call_after_a_death() -> None:
    executor = StageExecutor(stage(1, 2, 1))
    executor.start()
    os.kill(run(executor, ToyPlan()).pids[-1], signal.SIGKILL)
    eventually(lambda: executor.lost)
    with pytest.raises(WorkerDied, match="a worker process ended in encode"):
        run(executor, ToyPlan())
    assert not executor.healthy
    executor.restart()
    assert run(executor, ToyPlan()).total == 6
    executor.close()


def test_a_call_after_a_death_that_was_noticed_says_so() -> None:
    in_new_process(call_after_a_death)


def start_without_weights() -> None:
    executor = StageExecutor(stage(1, 2, 1, model=Path("/nowhere")))
    with pytest.raises(CheckpointError, match="/nowhere is missing"):
        executor.start()
    with pytest.raises(WorkerDied):
        executor.call("ping", 1)
    # multiprocessing's resource tracker stays with its process
    eventually(lambda: len(processes_below(os.getpid())) <= 1, HANG / 2)


def test_an_error_of_loading_reaches_the_caller() -> None:
    in_new_process(start_without_weights)


FORK = multiprocessing.get_context("fork")


def orphan() -> None:
    """A rank that looks for its parent when that has ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    while os.getppid() == parent.pid:
        time.sleep(0.01)
    end_with_parent()
    time.sleep(2 * HANG)


def starter(told: Connection) -> None:
    rank = FORK.Process(target=orphan)
    rank.start()
    told.send(rank.pid)
    os._exit(0)


def started_and_left() -> list[object]:
    """What is left of a rank whose parent ends before it has looked."""
    heard, told = FORK.Pipe(duplex=False)
    parent = FORK.Process(target=starter, args=(told,))
    parent.start()
    pid = heard.recv()
    parent.join()
    return remaining({pid}, set())


def test_a_rank_ends_with_a_parent_that_is_killed_while_it_starts() -> None:
    assert not in_new_process(started_and_left)


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


def counted() -> tuple[int, int]:
    """Processes below this one, and its open files."""
    return len(processes_below(os.getpid())), len(os.listdir("/proc/self/fd"))


def kill_and_recover(rounds: int) -> list[object]:
    """What is left of all that there ever was, once there is no more than after the second round."""
    executor = StageExecutor(stage(1, 2, 1))
    executor.start()
    counts, seen, segments = [], set[int](), set[Path]()
    for _ in range(rounds):
        with pytest.raises(WorkerDied):
            run(executor, ToyPlan(faults={"step 1": "kill"}))
        executor.restart()
        assert run(executor, ToyPlan()).total == 6
        below = processes_below(os.getpid())
        seen |= below
        segments |= segments_of(below)
        counts.append(counted())
    eventually(lambda: all(map(le, counted(), counts[1])), HANG / 2)
    executor.close()
    eventually(lambda: len(seen - processes_below(os.getpid())) == 2 * rounds, HANG / 2)
    return remaining(seen - processes_below(os.getpid()), segments)


def test_rounds_of_kill_and_recover_leave_nothing_behind() -> None:
    assert not in_new_process(kill_and_recover, 5)


def test_the_ray_executor_is_called_like_the_local_one() -> None:
    """vLLM has no Ray on the CPU: what `StageExecutor` relies on is read from its source."""
    source = Path(find_spec("vllm.v1.executor.ray_executor_v2").origin).read_text()
    tree = ast.parse(source)
    (ray,) = (
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == "RayExecutorV2"
    )
    assert [ast.unparse(base) for base in ray.bases] == ["MultiprocExecutor"]
    methods = {node.name: node for node in ray.body if isinstance(node, ast.FunctionDef)}
    assert [a.arg for a in methods["__init__"].args.args] == ["self", "vllm_config"]
    assert "collective_rpc" not in methods  # inherited, with the queues that are read here
    for attribute in ("response_mqs", "futures_queue", "is_failed"):
        assert f"self.{attribute} =" in ast.unparse(ray), attribute
    assert "self.run_ref = " in source
    assert list(signature(MultiprocExecutor.collective_rpc).parameters)[:6] == [
        "self",
        "method",
        "timeout",
        "args",
        "kwargs",
        "non_block",
    ]
    assert "futures_queue" in getsource(MultiprocExecutor.collective_rpc)


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
