"""What the ranks make of a simulator's sessions for a server: frames that are checked before anybody sees them.

Runs in the workers. The history of a session has the frames as they were made.
"""

from __future__ import annotations

from dataclasses import replace

from vllm_cosmos3.errors import Cosmos3Error
from vllm_cosmos3.generator.output import Output
from vllm_cosmos3.generator.world import ChunkState, WorldPipeline
from vllm_cosmos3.server.frame_check import Refusal, frame_check


class ServedWorldPipeline(WorldPipeline):
    """The pipeline of a simulator, where guardrails look at the frames."""

    def finish(self, state: ChunkState) -> Output | Refusal:  # type: ignore[override]
        output = super().finish(state)
        check = frame_check()
        if check is None or output.video is None:  # or not the rank that has the pixels
            return output
        try:
            frames, _ = check(output.video)
        except Cosmos3Error as error:
            return Refusal(error.code, str(error))
        (sample,) = output.samples
        return replace(output, samples=(replace(sample, video=frames),))
