"""Weight updates that fail on one of two ranks, or take it with them: all ranks have the same weights afterwards."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from limits import HANG

from vllm_cosmos3.checkpoint.synthetic import write_checkpoint
from vllm_cosmos3.engine_options import EngineConfig
from vllm_cosmos3.errors import Cosmos3Error, InvalidRequest, WorkerDied
from vllm_cosmos3.generator.pipeline import Pipeline
from vllm_cosmos3.request.planner import make_plan
from vllm_cosmos3.request.prompts import load_tokenizer
from vllm_cosmos3.request.request import from_fields
from vllm_cosmos3.stage.client import StageClient
from vllm_cosmos3.stage.config import StageConfig

REQUEST = {"prompt": "a boat", "size": "64x64", "num_frames": 1, "num_inference_steps": 2, "seed": 1, "output_type": "latent"}  # fmt: skip


class Unsteady(Pipeline):
    """Its last rank does what is named by the version, or by the path of an update, at the end of the call."""

    def start_weight_update(self) -> None:
        super().start_weight_update()
        marker = self.config.model / "unsteady"
        if marker.exists():
            self._on_last(marker.read_text())

    def update_weights(self, info: Any) -> None:
        super().update_weights(info)
        self._on_last(info.get("then"))

    def finish_weight_update(self, version: str | None = None) -> None:
        if version == "fails before":
            self._on_last("fails")
        super().finish_weight_update(version)
        self._on_last(version)

    def keep_weight_update(self) -> None:
        super().keep_weight_update()
        marker = self.config.model / "unkept"
        if marker.exists():
            self._on_last("fails")

    def _on_last(self, what: str | None) -> None:
        if self.mesh.world.rank == 0:
            return
        if what == "fails":
            raise RuntimeError("the last rank fails")
        if what == "dies":
            os.kill(os.getpid(), signal.SIGKILL)


class Trainee:
    """Two ranks of a checkpoint, and what a trainer has for them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.other = folder / "tiny", folder / "other"
        write_checkpoint(self.folder, dtype="float32")
        write_checkpoint(self.other, seed=1, dtype="float32")
        self.shards = sorted((self.other / "transformer").glob("*.safetensors"))
        engine = EngineConfig(model=self.folder, device="cpu", dtype="float32", tensor_parallel_size=2, weight_transfer="files")  # fmt: skip
        self._model, self._tokenizer = engine.read_model(), load_tokenizer(self.folder)
        config = StageConfig(engine=engine, stage=f"{__name__}:{Unsteady.__name__}", grace=HANG)
        self.client = StageClient(config)
        self.client.wait_ready(HANG)

    def latents(self) -> np.ndarray:
        """Of a request that is served now."""
        plan = make_plan(from_fields(REQUEST), self._model, self._tokenizer)
        found: np.ndarray = self.client.submit(plan).result(HANG).samples[0].latents["vision"]
        return found

    def update(self, version: str | None, *, then: str | None = None) -> None:
        """All parts of an update, of which the last one is followed by ``then``."""
        self.client.maintain("start_weight_update")
        for shard in self.shards:
            last = then if shard == self.shards[-1] else None
            self.client.maintain("update_weights", {"path": str(shard), "then": last})
        self.client.maintain("finish_weight_update", version)


@pytest.fixture(scope="module")
def trainee(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainee]:
    made = Trainee(tmp_path_factory.mktemp("trainee"))
    yield made
    made.client.close()


def test_an_update_that_fails_anywhere_leaves_the_old_weights_on_both(trainee: Trainee) -> None:
    old = trainee.latents()
    for version, then in (("fails before", None), ("fails", None), ("", "fails")):
        with pytest.raises(Cosmos3Error, match="the last rank fails"):
            trainee.update(version, then=then)
        assert np.array_equal(trainee.latents(), old), (version, then)
        assert trainee.client.status().weights is None
    (trainee.folder / "unsteady").write_text("fails")
    with pytest.raises(Cosmos3Error, match="start_weight_update failed"):
        trainee.update(None)
    (trainee.folder / "unsteady").unlink()
    with pytest.raises(InvalidRequest, match="start_weight_update called before"):
        trainee.client.maintain("update_weights", {"path": str(trainee.shards[0])})
    assert np.array_equal(trainee.latents(), old)

    trainee.update("second")
    new = trainee.latents()
    assert np.abs(new - old).max() > 0.1
    with pytest.raises(Cosmos3Error, match="the last rank fails"):
        trainee.update("fails before")
    assert np.array_equal(trainee.latents(), new)
    status = trainee.client.status()
    assert (status.state, status.weights, status.restarts) == ("ready", "second", 0)


def test_an_update_that_a_rank_does_not_survive_ends_with_the_checkpoint_on_both(
    trainee: Trainee,
) -> None:
    trainee.update("second")
    with pytest.raises(WorkerDied, match=r"ended in finish.*new ranks load the weights of the checkpoint"):  # fmt: skip
        trainee.update("dies")
    first = trainee.latents()
    trainee.update("third")
    new = trainee.latents()
    assert np.abs(new - first).max() > 0.1
    status = trainee.client.status()
    assert (status.weights, status.updates, status.restarts) == ("third", 1, 1)
    (trainee.folder / "unkept").touch()
    with pytest.raises(WorkerDied, match="the last rank fails; new ranks load"):
        trainee.update("fourth")
    (trainee.folder / "unkept").unlink()
    assert np.array_equal(trainee.latents(), first)
    assert (trainee.client.status().weights, trainee.client.status().updates) == (None, 0)
    with pytest.raises(InvalidRequest, match="the update was lost with a rank, and all have the weights of the checkpoint"):  # fmt: skip
        trainee.client.maintain("update_weights", {"path": str(trainee.shards[0])})
