"""The real pipeline on a device that runs out of memory in the middle of some requests' steps."""

from __future__ import annotations

import torch

from vllm_cosmos3.generator.pipeline import Pipeline, RequestState

EVERYWHERE, LAST_RANK = 1001, 1002  # seeds of requests that fail so, in their second step


class ShortPipeline(Pipeline):
    """Fails as torch's allocator does, after what the step has allocated so far."""

    def step(self, state: RequestState) -> int:
        last = self.mesh.world.rank == self.mesh.world.size - 1
        seed = state.plan.seeds[0]
        if state.index == 1 and (seed == EVERYWHERE or (seed == LAST_RANK and last)):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().step(state)
