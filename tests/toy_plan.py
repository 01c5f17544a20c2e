"""What is asked of the stage of `toy_stage`, and its answers. Programs that start one import no more."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from limits import HANG

from vllm_cosmos3.engine_options import EngineConfig
from vllm_cosmos3.stage.config import StageConfig


def stage(
    cfg: int = 1,
    ulysses: int = 1,
    tp: int = 1,
    *,
    model: Path = Path("/"),
    backend: str = "mp",
    grace: float = HANG,
) -> StageConfig:
    """With a short ``grace`` for tests in which a rank fails while others wait for it in a collective."""
    engine = EngineConfig(
        model=model,
        device="cpu",
        cfg_parallel_size=cfg,
        ulysses_degree=ulysses,
        tensor_parallel_size=tp,
    )
    return StageConfig(
        engine=engine, stage="toy_stage:Toy", backend=backend, timeout=HANG, grace=grace
    )


@dataclass(frozen=True)
class Gate:
    """A moment of a request at which its last rank waits until it may pass. ``folder`` is one of all processes."""

    folder: Path

    def wait(self) -> None:
        (self.folder / "reached").touch()
        while not (self.folder / "open").exists():
            time.sleep(0.01)

    def open(self) -> None:
        (self.folder / "open").touch()

    @property
    def reached(self) -> bool:
        return (self.folder / "reached").exists()


@dataclass(frozen=True)
class ToyPlan:
    """``faults`` maps a moment ("encode", "step 2", "decode", "finish") to what happens then.

    A fault is "all" or "one" rank raising before a collective, "invalid", "memory" (on all ranks),
    "memory one", "hang" or "kill" on the last rank, or "crowded" until it is tried a second time.
    ``gates`` maps a moment to the gate that is there.
    ``result`` is "broken" if it cannot be pickled after its first MiB, "deadly" if its rank dies
    there, and "unreadable" if it cannot be read again.
    """

    steps: int = 3
    seconds: float = 0.0
    faults: dict[str, str] = field(default_factory=dict)
    gates: dict[str, Gate] = field(default_factory=dict)
    result: str = "sound"


@dataclass(frozen=True)
class ToyResult:
    total: int
    pids: tuple[int, ...]
    batch_sizes: tuple[int, ...] = ()  # of each step
    weights: int = 0  # how many parts the last weight update had

    def save(self, path: Path) -> list[Path]:
        path.write_text(str(self.total))
        return [path]
