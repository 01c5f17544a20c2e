"""Sessions of a simulator through stage and executor, on two ranks in processes of their own."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from ranks import by_age, processes_below
from rollouts import PICTURE

from vllm_cosmos3 import Cosmos3
from vllm_cosmos3.checkpoint.synthetic import write_checkpoint
from vllm_cosmos3.errors import SessionLost, WorkerDied

START = {"prompt": "A robot arm", "size": "48x64", "seed": 5, "history": 6, "image": PICTURE}
ROWS = np.random.RandomState(2).standard_normal((2, 8, 59)).astype(np.float32)


def test_turns_a_lost_rank_and_a_new_session(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "tiny", kind="sim-bimanual", dtype="float32")
    where = {"dtype": "float32", "device": "cpu"}
    with Cosmos3(tmp_path / "tiny", **where) as model, model.session(**START) as session:
        expected = list(session.rollout(ROWS))
    with Cosmos3(tmp_path / "tiny", **where, tensor_parallel_size=2) as model:
        made: dict[int, list[np.ndarray]] = {}

        def play(number: int) -> None:
            with model.session(**START) as one:
                made[number] = list(one.rollout(ROWS))

        threads = [threading.Thread(target=play, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for frames in made.values():
            for mine, theirs in zip(frames, expected, strict=True):
                assert np.abs(mine.astype(int) - theirs.astype(int)).max() <= 1
        lost = model.session(**START)
        stage = model._runner._client._process.pid  # type: ignore[union-attr]
        os.kill(by_age(processes_below(stage))[-1], signal.SIGKILL)
        with pytest.raises((SessionLost, WorkerDied)):
            lost.step(ROWS[0])
        with pytest.raises(SessionLost, match="the session is gone"):
            lost.step(ROWS[0])
        lost.close()
        with model.session(**START) as again:
            assert np.array_equal(again.step(ROWS[0]), made[0][1])
