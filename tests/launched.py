"""Ranks under torchrun. As a script, one of them: ``launched.py NAME CHECKPOINT OUT``.

`launch` runs the command, with which each rank imports vLLM. `fork` is for many ranks: torchrun's own agent
forks them from a process that has imported it.

Each rank writes to OUT/RANK.json what it met, one line for each request: "served", or the error, and
to OUT/command-NUMBER-RANK.json what each command of OUT/commands.json has said.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import PIL.Image
import torch
from limits import HANG
from ranks import in_new_process
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from vllm.platforms import current_platform

from vllm_cosmos3 import Cosmos3
from vllm_cosmos3.cli import main
from vllm_cosmos3.generator.output import Progress
from vllm_cosmos3.imports import end_at_once
from vllm_cosmos3.media import Clip
from vllm_cosmos3.parallel.graphs import ON_MESHES, Recording
from vllm_cosmos3.stage.executor import StageExecutor

SMALL: dict[str, Any] = {
    "prompt_token_ids": [10, 11, 12],
    "negative_prompt_token_ids": [13],
    "size": "64x48",
    "num_frames": 5,
    "num_inference_steps": 2,
    "seed": 1,
}
FORKING = Path(__file__).with_name("forking")


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """The status of a command on one rank, and what it has printed there."""

    status: int
    out: str
    err: str


def launch(
    name: str,
    checkpoint: Path,
    out: Path,
    *,
    ranks: int = 2,
    commands: Sequence[Sequence[object]] = (),
    environment: Mapping[str, str] = os.environ,
) -> tuple[int, dict[int, list[str]]]:
    """The status of this script on so many ranks, and what each rank met."""
    prepare(out, commands)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(ranks), __file__, name, str(checkpoint), str(out)]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
        env={**environment, "PYTHONPATH": path},
    )
    met = met_in(out)
    assert met, done.stderr[-3000:]
    return done.returncode, met


def fork(
    name: str,
    checkpoint: Path,
    out: Path,
    *,
    ranks: int,
    commands: Sequence[Sequence[object]],
    environment: Mapping[str, str],
) -> tuple[int, dict[int, list[str]]]:
    """The same without `torchrun` and its script, whose ranks are forked."""
    prepare(out, commands)
    status = in_new_process(agent, dict(environment), ranks, name, checkpoint, out)
    return status, met_in(out)


def prepare(out: Path, commands: Sequence[Sequence[object]]) -> None:
    """What the ranks look for in their folder."""
    PIL.Image.new("RGB", (64, 48)).save(out / "there.png")
    (out / "commands.json").write_text(json.dumps([[*map(str, words)] for words in commands]))


def met_in(out: Path) -> dict[int, list[str]]:
    """What each rank met that came to its end."""
    return {int(file.stem): json.loads(file.read_text()) for file in out.glob("[0-9].json")}


def agent(
    environment: Mapping[str, str], ranks: int, name: str, checkpoint: Path, out: Path
) -> int:
    """What `torchrun --standalone --start-method fork` does with a function; its exit status."""
    os.environ.update(environment)
    if not torch.cuda.is_available():
        sys.path.append(str(FORKING))
        from forking_platform import ForkingCpu

        # A platform is chosen once, and was before the fork.
        current_platform.__class__ = ForkingCpu
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="fork",
    )
    try:
        elastic_launch(config, forked_rank)(name, checkpoint, out)
    except ChildFailedError:
        return 1
    return 0


def forked_rank(name: str, checkpoint: Path, out: Path) -> None:
    """One rank whose end is that of a program, with what has been registered for it."""
    atexit._clear()  # what the process had registered from which it was forked
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the agent's, in Python, waits for a collective
    one_rank(name, checkpoint, out)
    atexit._run_exitfuncs()


def said(out: Path, number: int) -> list[Said]:
    """What a command that was launched has said, by rank."""
    files = sorted(out.glob(f"command-{number}-*.json"))
    return [Said(**json.loads(file.read_text())) for file in files]


def assert_failed_together(met: dict[int, list[str]]) -> None:
    """What ranks met that made the requests of `failures`."""
    assert met[0][1::2] == met[1][1::2] == ["served"] * 4
    size, clip, progress, plan = met[0][::2]
    assert size.startswith("OutOfMemory: the request needs")
    assert clip.startswith("Cosmos3Error: a file could not be read or written (Is a directory")
    assert progress == "Cosmos3Error: progress failed: KeyError: 'enough'"
    assert plan.startswith("InvalidRequest: image is")
    assert met[1][::2] == [size, clip, "KeyError: 'enough'", plan]


def engine(checkpoint: Path, out: Path) -> list[str]:
    """On the CPU, with the tiny checkpoint."""
    large = {"size": "640x480", "num_frames": 61}
    return failures(checkpoint, out, large, dtype="float32", memory_limit=0.05)


def gpus(checkpoint: Path, out: Path) -> list[str]:
    """On GPUs, with two layers of Nano."""
    large = {"size": "1280x720", "num_frames": 189}
    return failures(checkpoint, out, large, load_format="dummy", memory_limit=7.5)


def failures(checkpoint: Path, out: Path, large: dict[str, Any], **settings: Any) -> list[str]:
    """Requests that fail on all ranks, on the first one, on the last one; each before a good one."""

    def generate(**fields: Any) -> Callable[[], object]:
        return lambda: model.generate(**SMALL | fields)

    def stop(progress: Progress) -> None:
        if rank() == last() and progress.step == 1:
            raise KeyError("enough")

    (out / "folder.mp4").mkdir(exist_ok=True)
    missing = Path("/nowhere.png") if rank() == last() else out / "there.png"
    with Cosmos3(
        checkpoint,
        ulysses_degree=2,
        distributed_executor_backend="external_launcher",
        **settings,
    ) as model:
        return heard(
            generate(**large),
            generate(),
            generate(clip=Clip(path=out / "folder.mp4")),
            generate(),
            generate(progress=stop),
            generate(),
            generate(image=missing),
            generate(),
        )


def two_ranks(checkpoint: Path, out: Path) -> list[str]:
    """One engine that meets failures, several after it, and commands."""
    lines = engine(checkpoint, out) + several(checkpoint, out)
    commands(out)
    return lines


def only_commands(_: Path, out: Path) -> list[str]:
    """Ranks that have no generator."""
    commands(out)
    return []


def four_ranks(checkpoint: Path, out: Path) -> list[str]:
    """Commands, and then ranks that do not end by themselves."""
    commands(out)
    return stuck(checkpoint, out)


def commands(out: Path) -> None:
    """One command after the other, each in the environment that torchrun has made."""
    for number, words in enumerate(json.loads((out / "commands.json").read_text())):
        printed, told = StringIO(), StringIO()
        with redirect_stdout(printed), redirect_stderr(told), patch.dict(os.environ):
            status = main(words)
        heard = Said(status=status, out=printed.getvalue(), err=told.getvalue())
        (out / f"command-{number}-{rank()}.json").write_text(json.dumps(asdict(heard)))


def several(checkpoint: Path, out: Path) -> list[str]:
    """One generator after the other, each on a mesh of its own."""

    def generate(axis: str) -> None:
        backend = "external_launcher"
        with Cosmos3(checkpoint, distributed_executor_backend=backend, **{axis: 2}) as model:
            model.generate(**SMALL)

    axes = ("ulysses_degree", "tensor_parallel_size", "cfg_parallel_size", "ulysses_degree")
    return heard(*(partial(generate, axis) for axis in axes))


def stuck(_: Path, out: Path) -> list[str]:
    """The last rank fails before a collective, in which the others then wait for ever."""
    from test_executor import run
    from toy_plan import ToyPlan, stage

    def ask(grace: float, *faults: str) -> list[str]:
        executor = StageExecutor(stage(1, last() + 1, 1, backend="external_launcher", grace=grace))
        executor.start()
        plans = [ToyPlan(faults={"step 1": fault}) for fault in faults]
        lines = heard(*(partial(run, executor, plan) for plan in plans))
        executor.close()
        return lines

    # Those that hear of its end wait for it, and do not come to their own.
    return ask(HANG, "none", "all", "none") + ask(0.5 if rank() == last() else HANG, "one", "none")


def graphs(checkpoint: Path, out: Path) -> list[str]:
    """Graphs over the collectives of two GPUs against launched kernels: pictures and a short video.

    A line says how many were recorded here, and on the first rank how far the latents are apart.
    """
    made: list[object] = []
    record = Recording._record

    def counted(recording: Recording, arguments: tuple[Any, ...]) -> None:
        made.append(recording)
        record(recording, arguments)

    def latents(*, recorded: bool) -> Any:
        with patch.dict(os.environ, {ON_MESHES: str(int(recorded))}):
            return model.generate(**SMALL | fields).samples[0].latents

    lines = []
    steps = {"num_inference_steps": 12, "guidance_scale": 6.0, "output_type": "latent"}
    for axis in ("ulysses_degree", "cfg_parallel_size"):
        with (
            patch.object(Recording, "_record", counted),
            Cosmos3(
                checkpoint,
                load_format="dummy",
                distributed_executor_backend="external_launcher",
                **{axis: 2},
            ) as model,
        ):
            for size, frames in (("320x192", 1), ("1280x720", 1), ("320x192", 29)):
                fields = {**steps, "size": size, "num_frames": frames}
                launched, count = latents(recorded=False), len(made)
                replayed = latents(recorded=True)
                line = f"{axis} {size} {frames}: {count} and {len(made) - count} recorded"
                if launched is not None:
                    a, b = (torch.from_numpy(each["vision"]) for each in (launched, replayed))
                    line += f", {float((a - b).norm() / a.norm()):.1e} apart"
                lines.append(line)
                made.clear()
    return lines


def heard(*requests: Callable[[], object]) -> list[str]:
    lines = []
    for request in requests:
        try:
            request()
            lines.append("served")
        except Exception as error:  # noqa: BLE001 - the test looks at it
            lines.append(f"{type(error).__name__}: {error}")
    return lines


def rank() -> int:
    """Which one this process is."""
    return int(os.environ["RANK"])


def last() -> int:
    return int(os.environ["WORLD_SIZE"]) - 1


def one_rank(name: str, checkpoint: Path, out: Path) -> None:
    """All that one rank does."""
    kinds = {
        "four_ranks": four_ranks,
        "gpus": gpus,
        "graphs": graphs,
        "only_commands": only_commands,
        "two_ranks": two_ranks,
    }
    lines = kinds[name](checkpoint, out)
    (out / f"{rank()}.json").write_text(json.dumps(lines))


if __name__ == "__main__":
    end_at_once()
    one_rank(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
