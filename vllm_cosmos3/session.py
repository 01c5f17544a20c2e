"""`Session`: a world that answers to actions, from Python."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from vllm_cosmos3.closing import Closing
from vllm_cosmos3.errors import Cosmos3Error
from vllm_cosmos3.generator.output import Output
from vllm_cosmos3.request.world import ChunkPlan, DomainName, World


class Session(Closing):
    """A session of a causal simulator. Made by `Cosmos3.session`.

        with model.session("A kitchen", image="kitchen.png") as world:
            frames = world.step(actions)

    Its history stays on the devices until it is closed. Several sessions of a model take turns, step by
    step, also from several threads. ``first`` is the frame that it begins with, uint8 [1, H, W, 3].
    """

    def __init__(
        self, world: World, run: Callable[[ChunkPlan], Output], release: Callable[[str], None]
    ) -> None:
        self._world, self._run, self._release = world, run, release
        self._closed = False
        self.fps = world.opening.fps
        self.seed = world.opening.seed
        try:
            self.first = self._made(world.open())
        except BaseException:
            self.close()
            raise

    @property
    def action_shape(self) -> tuple[int, int]:
        """Rows and columns of the actions of a step: a row for each frame that it makes."""
        return self._world.shape

    @property
    def domains(self) -> tuple[str, ...]:
        """Embodiments whose actions the checkpoint knows."""
        return tuple(self._world.causal.spaces)

    @property
    def frames(self) -> int:
        """Frames that were made so far, the first one included."""
        return 1 + (self._world.next - 1) * self._world.causal.rows_per_frame

    def step(self, actions: Any = None, *, domain_name: DomainName = None) -> np.ndarray:
        """The next frames, uint8 [T, H, W, 3], after ``actions`` of `action_shape`.

        A row leads from one frame to the next, in the units of the checkpoint: those of `poses` where
        it takes rows as they are, normalised ones where it takes those of all embodiments alike.
        Without ``actions`` nothing is done. ``domain_name`` is the embodiment of this step, if it is
        another than the session's, or a list with that of each row.

        Raises:
            InvalidRequest: the actions have another shape, or are no finite numbers.
            SessionLost: the workers were lost, and the session with them.
        """
        if self._closed:
            raise Cosmos3Error("this session is closed; open a new one")
        return self._made(self._world.step(actions, domain_name))

    def rollout(self, chunks: Iterable[Any]) -> Iterator[np.ndarray]:
        """The frames of a whole video: the first one, then a step for each of the ``chunks`` of actions."""
        yield self.first
        for actions in chunks:
            yield self.step(actions)

    def close(self) -> None:
        """Give the memory of the session back. A second call does nothing."""
        if not self._closed:
            self._closed = True
            self._release(self._world.name)

    def _made(self, plan: ChunkPlan) -> np.ndarray:
        output = self._run(plan)
        self._world.done(plan)
        video = output.video
        if video is None:  # on another rank
            height, width = (16 * side for side in self._world.opening.frame[3:])
            return np.empty((0, height, width, 3), np.uint8)
        return video
