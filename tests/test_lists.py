"""Lists of requests: those of one batch share their steps, and are what they are alone."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from generators import eventually

from vllm_cosmos3 import Cosmos3
from vllm_cosmos3.cli import main
from vllm_cosmos3.errors import Cancelled
from vllm_cosmos3.generator.memory import estimate, work_of
from vllm_cosmos3.generator.output import Output, Progress

PICTURE: dict[str, Any] = {"size": "96x64", "num_frames": 1, "num_inference_steps": 3}
LATENTS = PICTURE | {"output_type": "latent"}
LIMIT = 4
MAIN = threading.main_thread().ident or 0


@pytest.fixture(scope="module")
def model(tiny_checkpoint_fp32: Path) -> Iterator[Cosmos3]:
    with Cosmos3(
        tiny_checkpoint_fp32, dtype="float32", device="cpu", max_batch_size=LIMIT
    ) as model:
        yield model


def check_equal(output: Output, expected: Output) -> None:
    assert output.samples[0].seed == expected.samples[0].seed
    np.testing.assert_allclose(
        output.latents["vision"], expected.latents["vision"], rtol=0, atol=1e-5
    )


def test_equal_pictures_of_a_list_are_made_together(model: Cosmos3) -> None:
    asked = [{"prompt": f"{at} paper boats", "seed": at} for at in range(6)]
    asked.insert(3, {"prompt": "a boat", "seed": 9, "size": "64x64"})  # of another batch
    outputs = model.generate([LATENTS | one for one in asked])
    sizes = [output.batch_size for output in outputs]
    assert 1 < max(sizes) <= LIMIT  # those that wait for the device share a batch
    assert sizes[3] == 1
    for one, output in zip(asked, outputs, strict=True):
        alone = model.generate(**LATENTS | one)
        assert alone.batch_size == 1
        check_equal(output, alone)


def test_samples_sound_and_pictures_in_one_list(model: Cosmos3) -> None:
    """What is made alone, or with its own samples, goes through the same list."""
    clip = {"size": "96x64", "num_frames": 5, "num_inference_steps": 2, "generate_sound": True}
    several = PICTURE | {"n": 2}
    first, second, third = model.generate([PICTURE, clip, several], prompt="a boat", seed=3)
    assert (first.batch_size, second.batch_size, third.batch_size) == (1, 1, 2)
    assert second.sound is not None
    assert np.abs(first.image.astype(int) - third.samples[0].image).max() <= 1


def test_one_that_fails_ends_the_list(model: Cosmos3) -> None:
    def stop(progress: Progress) -> None:
        if progress.step == 1:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        model.generate([PICTURE] * 6, prompt="a boat", progress=stop)
    heard: list[Progress] = []
    model.generate([PICTURE] * 6, prompt="a boat", progress=heard.append)
    assert sum(progress.phase == "decode" for progress in heard) == 6


def test_a_list_is_cancelled_with_its_step(model: Cosmos3) -> None:
    cancelled = threading.Event()
    fields = PICTURE | {"prompt": "a boat", "num_inference_steps": 200}
    with pytest.raises(Cancelled, match="of 200 steps"):
        model._generate([fields] * 6, {}, lambda _: cancelled.set(), cancelled)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as in a terminal; who starts the tests in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_of_a_list_that_waits_leaves_room_for_the_next(model: Cosmos3) -> None:
    def interrupt(_: Progress) -> None:
        eventually(lambda: not model._slots._free._value)  # the list has all slots but this one
        signal.pthread_kill(MAIN, signal.SIGINT)
        raise Cancelled("by the test")

    one = threading.Thread(target=pytest.raises, args=(Cancelled, model.generate, PICTURE),
                           kwargs={"prompt": "a boat", "progress": interrupt})  # fmt: skip
    one.start()
    eventually(lambda: model._slots._free._value == LIMIT - 1)
    with pytest.raises(KeyboardInterrupt):
        model.generate([PICTURE] * 2, prompt="a boat")
    one.join()
    assert len(model.generate([PICTURE] * 2, prompt="a boat")) == 2


def test_without_the_memory_for_a_batch_a_list_is_made_all_the_same(
    model: Cosmos3, tiny_checkpoint_fp32: Path
) -> None:
    asked = [LATENTS | {"prompt": "a boat", "seed": seed} for seed in range(LIMIT)]
    memory = estimate(model._model, model._config, work_of(model.plan(**asked[0])))
    limit = (memory.resident + 1.1 * memory.request) / 2**30  # of one, but not of all of them
    config = {"dtype": "float32", "device": "cpu", "max_batch_size": LIMIT, "memory_limit": limit}
    with Cosmos3(tiny_checkpoint_fp32, **config) as small:
        outputs = small.generate(asked)
    for one, output in zip(asked, outputs, strict=True):
        check_equal(output, model.generate(**one))
        assert output.batch_size < LIMIT


def test_records_of_a_batch_file_are_made_together(
    model: Cosmos3, tiny_checkpoint_fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records: list[dict[str, Any]] = [
        {"prompt": f"{at} paper boats", "name": f"boats-{at}", "seed": at, "num_frames": 1}
        for at in range(8)
    ]
    records.insert(2, {"prompt": "a boat", "name": "clip", "num_frames": 5})
    records.append({"prompt": "it sails on", "name": "next", "continue_from": "clip", "num_frames": 5})  # fmt: skip
    (tmp_path / "records.jsonl").write_text("\n".join(map(json.dumps, records)))
    monkeypatch.setattr("vllm_cosmos3.cli.batch.open_generator", lambda _: nullcontext(model))
    command = ["generate", str(tiny_checkpoint_fp32), "--dtype", "float32"]
    command += ["--max-batch-size", str(LIMIT), "--input", str(tmp_path / "records.jsonl")]
    command += ["--size", "96x64", "--num-inference-steps", "3"]
    for flags in ([], ["--keep-going"]):
        out = tmp_path / f"out{len(flags)}"
        assert main([*command, "--out", str(out), *flags]) == 0
        found = {
            record["name"]: json.loads((out / record["name"] / "sample_outputs.json").read_text())
            for record in records
        }
        sizes = {name: outputs["batch_size"] for name, outputs in found.items()}
        assert max(sizes[f"boats-{at}"] for at in range(8)) > 1
        assert (found["clip"]["status"], found["next"]["status"]) == ("success", "success")
