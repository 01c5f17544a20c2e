"""`Cosmos3` on several ranks and replicas, in stages of their own."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from limits import HANG

from vllm_cosmos3 import Cosmos3
from vllm_cosmos3.cli import main
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.generator.output import Output, Progress
from vllm_cosmos3.media import Clip

REQUEST = {"prompt": "A paper boat", "num_frames": 5, "height": 64, "width": 64, "seed": 3}
REQUEST |= {"num_inference_steps": 3}


@pytest.fixture(scope="module")
def alone(tiny_checkpoint_fp32: Path) -> Output:
    """The decoded result of one rank."""
    with Cosmos3(tiny_checkpoint_fp32, dtype="float32", device="cpu") as model:
        return model.generate(**REQUEST)


@pytest.fixture(scope="module")
def staged(tiny_checkpoint_fp32: Path) -> Iterator[Cosmos3]:
    """Four ranks in processes of their own."""
    config = {"ulysses_degree": 2, "cfg_parallel_size": 2, "max_batch_size": 4}
    with Cosmos3(tiny_checkpoint_fp32, dtype="float32", device="cpu:0", **config) as model:
        yield model


@pytest.fixture(scope="module")
def replicas(tiny_checkpoint_fp32: Path) -> Iterator[Cosmos3]:
    """Two replicas of one rank."""
    with Cosmos3(
        tiny_checkpoint_fp32, dtype="float32", device="cpu", data_parallel_size=2
    ) as model:
        yield model


def test_replicas_share_a_list_and_give_what_one_gives(replicas: Cosmos3, alone: Output) -> None:
    heard: list[Progress] = []
    outputs = replicas.generate([REQUEST, REQUEST | {"seed": 4}, REQUEST], progress=heard.append)
    assert [output.samples[0].seed for output in outputs] == [3, 4, 3]
    assert np.abs(outputs[0].video.astype(int) - alone.video.astype(int)).max() <= 1
    assert np.array_equal(outputs[0].video, outputs[2].video)
    assert sum(progress.phase == "decode" for progress in heard) == 3

    def stop(progress: Progress) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        replicas.generate([REQUEST] * 5, progress=stop)
    assert replicas.generate(**REQUEST).samples[0].seed == 3


def test_replicas_share_a_batch_file(
    replicas: Cosmos3,
    tiny_checkpoint_fp32: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One that continues another waits for it."""
    small = ["--num-frames", "5", "--size", "64x64", "--num-inference-steps", "2"]
    records = [{"prompt": "a boat", "name": name} for name in ("one", "two", "three")]
    records.append({"prompt": "it sails on", "name": "four", "continue_from": "one"})
    (tmp_path / "records.jsonl").write_text("\n".join(map(json.dumps, records)))
    monkeypatch.setattr("vllm_cosmos3.cli.batch.open_generator", lambda _: nullcontext(replicas))
    flags = ["--input", str(tmp_path / "records.jsonl"), "--out", str(tmp_path / "out"), *small]
    command = ["generate", str(tiny_checkpoint_fp32), "--data-parallel-size", "2"]
    assert main([*command, *flags]) == 0
    for name in ("one", "two", "three", "four"):
        assert (tmp_path / "out" / name / "vision.mp4").is_file()
    assert main([*command, "--prompt", "a boat", "--out", str(tmp_path / "one")]) == 2
    assert "--data-parallel-size is 2, must be 1 without --input" in capsys.readouterr().err


def test_a_stage_gives_what_one_rank_gives(staged: Cosmos3, alone: Output) -> None:
    heard: list[Progress] = []

    async def cancelled(model: Cosmos3) -> None:
        loop, begun = asyncio.get_running_loop(), asyncio.Event()
        fields = REQUEST | {"num_inference_steps": 200}
        task = asyncio.ensure_future(
            model.agenerate(**fields, progress=lambda _: loop.call_soon_threadsafe(begun.set))
        )
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    output = staged.generate(**REQUEST, progress=heard.append)
    asyncio.run(cancelled(staged))
    again = staged.generate(**REQUEST)
    with pytest.raises(InvalidRequest):
        staged.generate(**(REQUEST | {"num_inference_steps": 0}))
    assert np.abs(output.video.astype(int) - alone.video.astype(int)).max() <= 1
    assert np.array_equal(output.video, again.video)
    assert [(p.phase, p.step) for p in heard if p.phase == "denoise"] == [
        ("denoise", step) for step in range(4)
    ]
    assert output.timings.keys() == alone.timings.keys()


def test_the_time_may_run_out_in_the_progress(staged: Cosmos3) -> None:
    """Waiting for a stage times out now and then, which is something else."""

    def stop(progress: Progress) -> None:
        raise TimeoutError("it takes too long")

    cancelled = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(staged._generate, None, REQUEST, stop, cancelled)
        wait([running], HANG)
        cancelled.set()  # if it hangs
        assert str(running.exception()) == "it takes too long"


def test_a_list_shares_the_steps_of_a_stage(staged: Cosmos3, alone: Output) -> None:
    outputs = staged.generate([REQUEST] * 8)
    assert 1 < max(output.batch_size for output in outputs) <= 4
    for output in outputs:
        assert np.abs(output.video.astype(int) - alone.video.astype(int)).max() <= 1


def test_a_clip_is_written_where_its_owner_is(
    staged: Cosmos3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the ranks stay in the folder where they were started
    clip = Path("boat.mp4")
    output = staged.generate(**REQUEST, clip=Clip(path=clip))
    written = clip.stat().st_mtime_ns
    assert output.save(clip) == [clip]
    assert clip.stat().st_mtime_ns == written  # nothing was left to do
    clip.unlink()
    assert output.save(clip) == [clip]
    assert clip.stat().st_size > 1000


def test_a_mesh_that_cannot_be_is_refused_before_anything_starts(tiny_checkpoint: Path) -> None:
    with pytest.raises(InvalidRequest, match="tensor_parallel_size is 3, must be 1, 2 or 4"):
        Cosmos3(tiny_checkpoint, device="cpu", tensor_parallel_size=3)
    with pytest.raises(InvalidRequest, match="Ray executor needs GPUs"):
        Cosmos3(
            tiny_checkpoint, device="cpu:0", ulysses_degree=2, distributed_executor_backend="ray"
        )
