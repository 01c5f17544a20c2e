"""Memory at Nano's width: the plan, weights that rest on the host, refusals and recovery."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vllm_cosmos3 import Cosmos3
from vllm_cosmos3.engine_options import EngineConfig, ParallelConfig
from vllm_cosmos3.errors import InvalidRequest, OutOfMemory
from vllm_cosmos3.generator.memory import estimate, work_of
from vllm_cosmos3.generator.pipeline import Pipeline
from vllm_cosmos3.parallel.mesh import close_mesh, init_mesh
from vllm_cosmos3.progress import Progress
from vllm_cosmos3.request.planner import make_plan
from vllm_cosmos3.request.request import from_fields

pytestmark = pytest.mark.gpu

VIDEO = {
    "prompt_token_ids": list(range(10, 138)),
    "negative_prompt_token_ids": list(range(20, 1020)),
    "size": "832x480",
    "num_frames": 29,
    "num_inference_steps": 3,
    "guidance_scale": 6.0,
    "seed": 3,
}
IMAGE = VIDEO | {"size": "320x192", "num_frames": 1}
PLACEMENTS = [
    {"und_residency": "gpu"},
    {"und_residency": "host"},
    {"und_residency": "gpu", "enable_layerwise_offload": True},
    {"und_residency": "host", "enable_layerwise_offload": True},
]


@pytest.fixture(autouse=True)
def clean_device() -> Iterator[None]:
    """What other tests have left would count; session fixtures do not, as peaks are differences."""
    gc.collect()
    torch.cuda.empty_cache()
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def run(config: EngineConfig, fields: dict[str, object]) -> tuple[torch.Tensor, int, int]:
    """The latents; bytes at the peak from before loading on, and as planned."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    mesh = init_mesh(ParallelConfig())
    try:
        pipeline = Pipeline.load(config, mesh, config.device)
    finally:
        close_mesh(mesh)
    loading = torch.cuda.max_memory_allocated()
    plan = make_plan(from_fields(fields), pipeline.model, pipeline.tokenizer)
    state = pipeline.encode(plan)
    while not state.done:
        pipeline.step(state)
    latents = state.denoised[0]["vision"].cpu()
    pipeline.decode(state)
    peak = max(loading, torch.cuda.max_memory_allocated()) - before
    return latents, peak, estimate(pipeline.model, pipeline.config, work_of(plan)).peak


def test_placements_change_no_bit_and_the_plan_holds(
    wide_checkpoint: Path, device: torch.device
) -> None:
    base = EngineConfig(model=wide_checkpoint, device=str(device), load_format="dummy")
    first = None
    for settings in PLACEMENTS:
        latents, measured, planned = run(replace(base, **settings), VIDEO)
        first = latents if first is None else first
        assert torch.equal(latents, first), settings
        assert abs(planned - measured) <= 0.1 * measured, (settings, planned, measured)


def test_what_does_not_fit_is_refused_and_the_next_request_served(
    wide_checkpoint: Path, device: torch.device
) -> None:
    with Cosmos3(wide_checkpoint, device=str(device), load_format="dummy") as model:
        expected = model.generate(**IMAGE).image
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        ballast = torch.empty(free - 3 * 2**29, dtype=torch.uint8, device=device)
        steps: list[Progress] = []
        with pytest.raises(OutOfMemory, match=r"needs [\d,]+ bytes .* are free"):
            model.generate(**VIDEO, progress=steps.append)
        assert all(progress.phase == "encode" for progress in steps)
        del ballast
        assert (model.generate(**IMAGE).image == expected).all()


def test_the_peak_is_that_of_the_request(wide_checkpoint: Path, device: torch.device) -> None:
    with Cosmos3(wide_checkpoint, device=str(device), load_format="dummy") as model:
        image, video, again = (model.generate(**x).peak_memory for x in (IMAGE, VIDEO, IMAGE))
    assert image < video
    assert again - image < (video - image) / 2


def test_an_allocator_that_refuses_in_a_step_ends_the_request_alone(
    wide_checkpoint: Path, device: torch.device
) -> None:
    with Cosmos3(
        wide_checkpoint, device=str(device), load_format="dummy", enable_layerwise_offload=True
    ) as model:
        expected = model.generate(**IMAGE).image
        ballast: list[torch.Tensor] = []

        def fill(progress: Progress) -> None:
            if progress.phase == "denoise" and progress.step == 1:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
                free, _ = torch.cuda.mem_get_info(device)
                ballast.append(torch.empty(free - 2**26, dtype=torch.uint8, device=device))

        with pytest.raises(OutOfMemory, match="fewer frames or a smaller size"):
            model.generate(**VIDEO, progress=fill)
        ballast.clear()
        assert (model.generate(**IMAGE).image == expected).all()


def test_a_limit_holds_the_allocator(wide_checkpoint: Path, device: torch.device) -> None:
    taken = torch.cuda.memory_allocated() / 2**30  # by pipelines of the session
    with Cosmos3(
        wide_checkpoint, device="cuda", load_format="dummy", memory_limit=taken + 10
    ) as model:
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(10 * 2**30, dtype=torch.uint8, device=device)
        assert model.generate(**IMAGE).image is not None
    assert torch.empty(11 * 2**30, dtype=torch.uint8, device=device).is_cuda


def test_asleep_the_device_is_free_and_awake_nothing_has_changed(
    wide_checkpoint: Path, device: torch.device
) -> None:
    before = torch.cuda.memory_allocated()
    with Cosmos3(wide_checkpoint, device=str(device), load_format="dummy") as model:
        expected = model.generate(**IMAGE).image
        held = torch.cuda.memory_allocated() - before
        weight = next(model._runner._pipeline.transformer.parameters())  # type: ignore[union-attr]
        places = set()
        for _ in range(2):
            model.sleep()
            assert torch.cuda.memory_allocated() - before < 0.01 * held
            assert weight.is_pinned()
            places.add(weight.data_ptr())
            model.wake_up()
            assert weight.is_cuda
            assert (model.generate(**IMAGE).image == expected).all()
        assert len(places) == 1  # nothing is pinned a second time


def test_an_update_that_is_given_up_leaves_the_weights(
    wide_checkpoint: Path, device: torch.device
) -> None:
    """A request long enough for CUDA graphs, before an update that is given up and after it."""
    fields = IMAGE | {"num_inference_steps": 10}
    with Cosmos3(
        wide_checkpoint, device=str(device), load_format="dummy", weight_transfer="files"
    ) as model:
        expected = model.generate(**fields).image
        model.start_weight_update()
        with pytest.raises(InvalidRequest):
            model.update_weights({"path": "/absent"})
        assert (model.generate(**fields).image == expected).all()
