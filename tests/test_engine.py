"""`Cosmos3` as a user sees it: fields in, `Output` out, files on disk, memory back."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from limits import HANG
from media_files import file_server
from PIL import Image
from safetensors.numpy import load_file

from vllm_cosmos3 import Cosmos3, GenerateRequest, Output
from vllm_cosmos3.errors import Cosmos3Error, InvalidRequest, Sleeping
from vllm_cosmos3.generator.output import Progress
from vllm_cosmos3.media import Clip

SMALL: dict[str, Any] = {"size": "96x64", "num_frames": 9, "num_inference_steps": 2, "seed": 1}


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Iterator[Cosmos3]:
    with Cosmos3(tiny_checkpoint, device="cpu") as model:
        yield model


def test_fields_mapping_request_and_prompt_are_the_same(model: Cosmos3) -> None:
    fields = {"prompt": "a boat", **SMALL}
    outputs = [
        model.generate(**fields),
        model.generate(fields),
        model.generate(GenerateRequest(**fields)),
        model.generate("a boat", **SMALL),
        model.generate({"prompt": "a boat"}, **SMALL),
        *model.generate([fields, GenerateRequest(**fields)]),
    ]
    for output in outputs:
        assert output.video is not None
        assert (output.video.shape, output.video.dtype) == ((9, 64, 96, 3), np.uint8)
        assert (output.video == outputs[0].video).all()
        assert output.effective == outputs[0].effective


def test_sound_is_stereo_in_range(model: Cosmos3) -> None:
    output = model.generate("a boat", **SMALL, generate_sound=True)
    assert output.sound is not None
    assert (output.sound.shape, output.sound.dtype) == ((2, 10 * 1920), np.float32)
    assert np.abs(output.sound).max() <= 1
    assert output.sample_rate == 48000


def test_asleep_nothing_is_made(model: Cosmos3) -> None:
    picture = {"prompt": "a boat", **SMALL, "num_frames": 1}
    before = model.generate(**picture).image
    model.sleep()
    model.sleep()
    assert model.is_sleeping
    with pytest.raises(Sleeping, match=r"this Cosmos3 sleeps; call wake_up\(\) first"):
        model.generate(**picture)
    assert model.plan(**picture).steps == 2
    model.wake_up()
    assert not model.is_sleeping
    assert np.array_equal(model.generate(**picture).image, before)


def test_a_list_is_checked_before_it_runs(model: Cosmos3) -> None:
    seen: list[Progress] = []
    good = {"prompt": "a boat", **SMALL}
    with pytest.raises(InvalidRequest, match="seed is -1"):
        model.generate([good, {**good, "seed": -1}], progress=seen.append)
    assert not seen
    with pytest.raises(InvalidRequest, match="for a single request"):
        model.generate([good], clip=Clip(path=Path("clip.mp4")))  # type: ignore[call-overload]


def test_a_list_shares_the_fields_given_by_name(model: Cosmos3) -> None:
    picture = SMALL | {"num_frames": 1}
    prompts = ["a boat", "a harbour"]
    listed = model.generate(prompts, **picture)
    assert [output.effective["prompt"] for output in listed] != [prompts[0]] * 2
    by_name: Any = model.generate(prompt=prompts, **picture)  # as pipelines of diffusers take it
    requests: list[Any] = [{"prompt": "a boat", "seed": 7}, GenerateRequest(prompt="a harbour")]
    mixed = model.generate(requests, **picture)
    for output, prompt in zip(listed, prompts, strict=True):
        alone = model(prompt, **picture).frames
        for other in (output, by_name[prompts.index(prompt)], mixed[prompts.index(prompt)]):
            assert (other.frames == alone).all()


def test_names_of_other_libraries(model: Cosmos3) -> None:
    fields: dict[str, Any] = {"size": "96x64", "num_frames": 9, "seed": 1}
    foreign: dict[str, Any] = {"num_steps": 2, "guidance": 2.0, "frame_rate": 12}
    plan = model.plan("a boat", **fields, **foreign)
    assert plan.parameters.num_inference_steps == 2
    assert plan.parameters.guidance_scale == 2.0
    assert plan.parameters.fps == 12
    with pytest.raises(InvalidRequest, match="given as seed=N"):
        model.plan("a boat", generator=torch.Generator())  # type: ignore[call-arg]


def test_a_picture_as_each_library_has_it(model: Cosmos3, tmp_path: Path) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    Image.fromarray(levels).save(tmp_path / "first.png")
    tensor = torch.from_numpy(levels)
    sources: list[Any] = [
        tmp_path / "first.png",
        Image.fromarray(levels),
        levels / 255,
        (levels / 255).astype(np.float32),
        tensor,
        tensor.permute(2, 0, 1),
        tensor.permute(2, 0, 1).float() / 255,
    ]
    with file_server(tmp_path) as url:
        sources.append(f"{url}/first.png")
        plans = [model.plan("a boat", image=source, **SMALL) for source in sources]
        effective = model.generate("a boat", image=sources[-1], **SMALL).effective
    assert effective["image"] == sources[-1]
    for plan in plans:
        assert (plan.streams[0].source == levels).all()
    with pytest.raises(InvalidRequest, match="image is 'floats from -1 to 1', must be floats"):
        model.plan("a boat", image=tensor.float() / 127.5 - 1, **SMALL)


def test_bars_are_shown_when_asked_for(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Cosmos3.from_pretrained(
        tiny_checkpoint, device="cpu", torch_dtype=torch.bfloat16, progress=True
    ) as model:
        model.generate("a boat", **SMALL)
        lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
        last = {line.split()[0]: line for line in lines if line.strip()}
        assert list(last) == ["load", "encode", "denoise", "decode"]
        assert all("100%" in line for line in last.values())
        model.generate("a boat", **SMALL, progress=False)
        assert capsys.readouterr().err == ""
        model.generate(["a boat"], **SMALL)
        assert "requests100%" in capsys.readouterr().err.replace(" ", "")


def test_progress(model: Cosmos3) -> None:
    seen: list[Progress] = []
    model.generate("a boat", **SMALL | {"num_frames": 1}, n=2, progress=seen.append)
    denoise = [(p.step, p.steps) for p in seen if p.phase == "denoise"]
    assert denoise == [(i, 4) for i in range(5)]
    assert [p.phase for p in seen if p.phase != "denoise"] == ["encode", "decode"]
    elapsed = [p.elapsed for p in seen]
    assert elapsed == sorted(elapsed)
    last = [p for p in seen if p.phase == "denoise"][-1]
    assert last.eta == 0
    assert all(p.eta is None or p.eta >= 0 for p in seen)


def test_what_progress_raises_ends_the_request(model: Cosmos3) -> None:
    def stop(progress: Progress) -> None:
        if progress.step == 1:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        model.generate("a boat", **SMALL, progress=stop)
    assert model.generate("a boat", **SMALL).video is not None


def test_agenerate_lets_the_loop_run_and_can_be_cancelled(model: Cosmos3) -> None:
    seen: list[int] = []
    left = threading.Event()

    async def scenario() -> Output:
        started = asyncio.Event()
        loop = asyncio.get_running_loop()

        def progress(p: Progress) -> None:
            seen.append(p.step)
            if p.step == 2:
                loop.call_soon_threadsafe(started.set)
                assert left.wait(HANG)

        slow = asyncio.create_task(
            model.agenerate("a boat", **SMALL | {"num_inference_steps": 200}, progress=progress)
        )
        await started.wait()
        slow.cancel()
        with pytest.raises(asyncio.CancelledError):
            await slow
        left.set()
        after = await model.agenerate("a boat", **SMALL)
        assert isinstance(after, Output)
        return after

    assert asyncio.run(scenario()).video is not None
    assert max(seen) == 2


def test_timings(model: Cosmos3) -> None:
    timings = model.generate("a boat", **SMALL).timings
    assert next(iter(timings)) == "model_load"
    assert list(timings)[-1] == "total"
    assert timings["total"] >= timings["denoise"] + timings["vae_decode"]


def test_save(model: Cosmos3, tmp_path: Path) -> None:
    video = model.generate("a boat", **SMALL, generate_sound=True)
    assert video.save(tmp_path / "new" / "clip") == [tmp_path / "new" / "clip.mp4"]
    with av.open(str(tmp_path / "new" / "clip.mp4")) as container:
        assert [s.type for s in container.streams] == ["video", "audio"]
        assert sum(1 for _ in container.decode(video=0)) == 9
    for wrong in ("clip.png", "clip.avi", "clip.safetensors"):
        with pytest.raises(InvalidRequest, match=r"a file of type \.mp4"):
            video.save(tmp_path / wrong)

    images = model.generate("a boat", **SMALL | {"num_frames": 1}, n=2)
    files = images.save(tmp_path / "a.png")
    assert [file.name for file in files] == ["a-0.png", "a-1.png"]
    for file, sample in zip(files, images.samples, strict=True):
        with Image.open(file) as image:
            assert (np.asarray(image) == sample.image).all()

    latents = model.generate("a boat", **SMALL, generate_sound=True, output_type="latent")
    (file,) = latents.save(tmp_path / "latents")
    assert {k: x.shape for k, x in load_file(file).items()} == {
        "vision": (1, 48, 3, 4, 6),
        "sound": (64, 10),
    }


def test_decoded_pixels_are_close_to_the_encoded(model: Cosmos3, tmp_path: Path) -> None:
    output = model.generate("a boat", **SMALL)
    assert output.video is not None
    (file,) = output.save(tmp_path / "a.mp4", crf=1)
    with av.open(str(file)) as container:
        frames = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    # Colour is stored at half the resolution: what survives is the brightness, BT.709.
    difference = (frames.astype(np.float32) - output.video) @ (0.2126, 0.7152, 0.0722)
    assert np.abs(difference).mean() < 3


def test_two_models_in_one_process(model: Cosmos3, tiny_checkpoint: Path) -> None:
    before = model.generate("a boat", **SMALL).video
    with Cosmos3(tiny_checkpoint, device="cpu", dtype="float32") as second:
        other = second.generate("a boat", **SMALL).video
    after = model.generate("a boat", **SMALL).video
    assert before is not None
    assert other is not None
    assert (before == after).all()
    assert np.abs(before.astype(int) - other).mean() < 8  # bfloat16 against float32


def test_close_frees_the_model(tiny_checkpoint: Path) -> None:
    model = Cosmos3(tiny_checkpoint, device="cpu")
    transformer = weakref.ref(model._open()._pipeline.transformer)
    model.close()
    gc.collect()
    assert transformer() is None
    with pytest.raises(Cosmos3Error, match="closed"):
        model.generate("a boat", **SMALL)


def test_a_cpu_may_have_a_number(model: Cosmos3, tiny_checkpoint: Path) -> None:
    with Cosmos3(tiny_checkpoint, device="cpu:0") as numbered:
        output = numbered.generate("a boat", **SMALL)
    assert (output.video == model.generate("a boat", **SMALL).video).all()


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"dtype": "int8"}, "dtype"),
        ({"device": "toaster"}, "device"),
        ({"device": "cuda"}, "device"),
        ({"device": "cpu:0,0", "data_parallel_size": 2}, "device"),
        ({"device": 5}, "device"),
        ({"vae_parallel": "both"}, "vae_parallel"),
        ({"attention_backend": "none"}, "attention_backend"),
        ({"load_format": "gguf"}, "load_format"),
    ],
)
def test_wrong_arguments(tiny_checkpoint: Path, arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Cosmos3(tiny_checkpoint, **{"device": "cpu", **arguments})
    assert caught.value.field == field


def test_groups_of_others_are_left_alone(tiny_checkpoint: Path) -> None:
    code = (
        "import torch.distributed as dist; from vllm_cosmos3 import Cosmos3\n"
        "from vllm_cosmos3.errors import Unsupported\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        f"try: Cosmos3({str(tiny_checkpoint)!r}, device='cpu')\n"
        "except Unsupported as error: print(error, dist.is_initialized())\n"
        "dist.destroy_process_group()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG, check=True
    )
    assert done.stdout.startswith("torch.distributed is initialised in this process")
    assert done.stdout.endswith("True\n")


def test_a_script_needs_no_main_guard(tiny_checkpoint: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from vllm_cosmos3 import Cosmos3\n"
        f"with Cosmos3({str(tiny_checkpoint)!r}, device='cpu') as model:\n"
        f"    print(model.generate('a boat', **{SMALL!r}).video.shape)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=HANG, check=True
    )
    assert done.stdout.splitlines()[-1] == "(9, 64, 96, 3)"
