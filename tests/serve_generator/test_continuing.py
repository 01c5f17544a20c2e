"""Videos over HTTP that go on from others, and rollouts."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import numpy as np
import pytest
from generators import LONG, PICTURE, SMALL, create, finished
from limits import HANG
from media_files import clip, data_url, picture, png
from PIL import Image
from servers import Server

from vllm_cosmos3.media import Pixels, read_image, read_video
from vllm_cosmos3.request.plan import Plan, StreamPlan
from vllm_cosmos3.server.http.api_errors import ApiError
from vllm_cosmos3.server.http.request_fields import ClientRequest
from vllm_cosmos3.server.jobs.continuation import continue_from, prepare
from vllm_cosmos3.server.jobs.job_files import BEFORE, CLIP, LAST
from vllm_cosmos3.server.jobs.journal import Journal
from vllm_cosmos3.server.jobs.video_job import VideoJob

pytestmark = pytest.mark.serve


@pytest.fixture(scope="module")
def source(generator_server: Server) -> dict[str, Any]:
    """A finished video."""
    return finished(generator_server, create(generator_server, **SMALL, fps=12))


def frames(server: Server, job: dict[str, Any]) -> Pixels:
    answer = httpx.get(f"{server.url}/v1/videos/{job['id']}/content")
    assert answer.status_code == 200, answer.text
    return read_video(answer.content, frames=999)


def small(server: Server, job: dict[str, Any], variant: str) -> np.ndarray:
    answer = httpx.get(f"{server.url}/v1/videos/{job['id']}/content?variant={variant}")
    return np.asarray(Image.open(io.BytesIO(answer.content)).convert("RGB"))


def refused(server: Server, path: str = "/v1/videos", **fields: Any) -> tuple[int, str, str]:
    body = {"prompt": "a boat", **SMALL, **fields}
    answer = httpx.post(f"{server.url}{path}", json=body, timeout=HANG)
    error = answer.json()["error"]
    assert "\n" not in error["message"]
    return answer.status_code, error["code"], error["param"]


def test_the_whole_is_the_old_frames_and_the_new_ones(
    generator_server: Server, source: dict[str, Any]
) -> None:
    fields = {"num_frames": 9, "num_inference_steps": 2, "seed": 2}
    job = create(generator_server, **fields, continue_from=source["id"])
    assert (job["num_frames"], job["cosmos3"]["continued_from"]) == (13, source["id"])
    assert job["cosmos3"]["effective"]["image"] == f"the last frame of {source['id']}"
    job = finished(generator_server, job)
    assert job["status"] == "completed", job["error"]
    assert (job["num_frames"], job["fps"], job["size"]) == (13, 12, "64x64")
    assert job["duration_s"] == pytest.approx(13 / 12)
    assert (job["cosmos3"]["mode"], job["usage"]["frames"]) == ("image2video", 9)
    before, whole = frames(generator_server, source), frames(generator_server, job)
    assert whole.shape == (13, 64, 64, 3)
    assert np.array_equal(whole[:5], before)  # nothing is encoded twice
    assert not np.array_equal(whole[5], before[-1])
    thumbnails = [small(generator_server, it, "thumbnail").astype(int) for it in (job, source)]
    assert np.abs(thumbnails[0] - thumbnails[1]).mean() < 15  # the first frame, of H.264 or not

    cached = {"seed": 3, "num_inference_steps": 6, "step_cache": "sea", "step_cache_threshold": 10}
    again = create(generator_server, **fields | cached, continue_from=job["id"])
    url = f"{generator_server.url}/v1/videos"
    assert httpx.delete(f"{url}/{job['id']}").status_code == 200  # it has what it needs
    again = finished(generator_server, again)
    assert again["num_frames"] == 21
    assert again["cosmos3"]["reused_steps"] == 3  # of 6: 1, 2 and 4
    assert np.array_equal(frames(generator_server, again)[:13], whole)
    assert small(generator_server, again, "spritesheet").shape == (256, 256, 3)


def test_the_first_new_frame_follows_the_last_old_one(
    generator_server: Server, source: dict[str, Any]
) -> None:
    """As the same request with the last frame as its picture, which the client cannot have exactly."""
    fields = {"num_frames": 5, "num_inference_steps": 2, "seed": 2, "fps": 12}
    continued = create(generator_server, **fields, continue_from=source["id"])
    last = Image.fromarray(frames(generator_server, source)[-1])
    by_hand = create(generator_server, **fields, size="64x64", input_reference=data_url(png(last), "image/png"))  # fmt: skip
    made = frames(generator_server, finished(generator_server, continued))[5:].astype(int)
    expected = frames(generator_server, finished(generator_server, by_hand))[1:]
    assert np.abs(made - expected).mean() < 12  # of H.264, once more than the other
    assert np.abs(made - frames(generator_server, source)[1:]).mean() > 20


def test_a_path_is_driven_further(generator_server: Server) -> None:
    fields = {
        "action_mode": "forward_dynamics", "domain_name": "av", "action": [[0.1] * 9] * 4,
        "num_inference_steps": 2, "seed": 1, "size": "96x64",
    }  # fmt: skip
    image = data_url(png(picture(80, 48)), "image/png")
    first = finished(generator_server, create(generator_server, **fields, input_reference=image))
    assert (first["status"], first["size"]) == ("completed", "80x48"), first["error"]
    further = create(generator_server, **fields, continue_from=first["id"])
    further = finished(generator_server, further)
    assert (further["status"], further["size"], further["num_frames"]) == ("completed", "80x48", 9)
    assert frames(generator_server, further).shape == (9, 48, 80, 3)


def test_controls_beside_a_video_do_not_go_on(generator_server: Server, tmp_path: Path) -> None:
    control = data_url(clip(tmp_path / "clip.mp4", frames=5, fps=12).read_bytes(), "video/mp4")
    shown = {"depth": control, "show_control_condition": True, "size": "64x64", "seed": 1}
    source = create(generator_server, **shown, num_inference_steps=2)
    before = frames(generator_server, finished(generator_server, source))
    assert before.shape == (5, 64, 128, 3)
    job = create(generator_server, num_frames=5, num_inference_steps=2, continue_from=source["id"])
    job = finished(generator_server, job)
    assert (job["status"], job["size"], job["num_frames"]) == ("completed", "64x64", 9), job[
        "error"
    ]
    whole = frames(generator_server, job)
    assert whole.shape == (9, 64, 64, 3)
    left, right = (before[:, :, part].astype(int) for part in (slice(64), slice(64, None)))
    far, near = (np.abs(whole[:5] - half).mean() for half in (left, right))
    assert near < far / 2  # encoded once more


def test_rollouts(generator_server: Server) -> None:
    job = create(generator_server, **SMALL, num_chunks=3)
    assert (job["num_frames"], job["cosmos3"]["num_steps"]) == (13, 6)
    job = finished(generator_server, job)
    assert (job["num_frames"], job["cosmos3"]["step"], job["progress"]) == (13, 6, 100)
    assert len(frames(generator_server, job)) == 13
    assert refused(generator_server, num_chunks=0) == (400, "invalid_value", "num_chunks")
    both = {"num_chunks": 2, "generate_sound": True}
    assert refused(generator_server, **both) == (400, "unsupported_combination", "num_chunks")


def test_what_cannot_go_on(generator_server: Server, source: dict[str, Any]) -> None:
    url = f"{generator_server.url}/v1/videos"
    assert refused(generator_server, continue_from="nope") == (404, "not_found", "continue_from")
    assert refused(generator_server, continue_from=7) == (400, "invalid_type", "continue_from")
    long = create(generator_server, **LONG)
    assert refused(generator_server, continue_from=long["id"]) == (409, "not_ready", "continue_from")  # fmt: skip
    assert httpx.delete(f"{url}/{long['id']}").status_code == 200
    assert refused(generator_server, continue_from=long["id"]) == (404, "not_found", "continue_from")  # fmt: skip
    late = finished(generator_server, create(generator_server, **LONG, deadline_seconds=0.1))
    assert late["status"] == "failed"
    assert refused(generator_server, continue_from=late["id"]) == (409, "job_failed", "continue_from")  # fmt: skip
    for fields, code, param in (
        ({"size": "96x64"}, "conflict", "size"),
        ({"fps": 24}, "conflict", "fps"),
        ({"generate_sound": True}, "unsupported_combination", "generate_sound"),
        ({"input_reference": data_url(png(picture(64, 64)), "image/png")}, "conflict", "input_reference"),
        ({"extra_params": {"continue_from": "other"}}, "conflict", "extra_params.continue_from"),
    ):  # fmt: skip
        asked = {"continue_from": source["id"], **fields}
        assert refused(generator_server, **asked) == (400, code, param), fields
    image = {k: v for k, v in PICTURE.items() if k != "seed"}
    answer = httpx.post(f"{generator_server.url}/v1/images/generations", json={"prompt": "a", "continue_from": source["id"], **image})  # fmt: skip
    assert answer.json()["error"]["code"] == "unknown_parameter"


def test_a_lost_file_has_expired(generator_server: Server) -> None:
    job = finished(generator_server, create(generator_server, **SMALL))
    storage = Path(generator_server.log).parent / "storage"
    shutil.rmtree(storage / "files" / job["id"])
    assert refused(generator_server, continue_from=job["id"]) == (410, "expired", "continue_from")


@pytest.mark.parametrize(("room", "error"), [(True, ApiError), (False, IsADirectoryError)])
def test_nothing_is_left_of_a_video_that_cannot_be_copied(
    room: bool, error: type[Exception], tmp_path: Path
) -> None:
    """As it was deleted while the new one was planned, or as there is no room for it."""
    journal = Journal(tmp_path)
    before, job = (VideoJob(id=name, kind="video", model="m", prompt="", created=0.0, effective={"fps": 12.0, "num_frames": 5}) for name in "ab")  # fmt: skip
    journal.folder("a").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(journal.folder("a") / LAST)
    if not room:
        (journal.folder("a") / CLIP).write_bytes(b"a clip")
        (journal.folder("b") / BEFORE).mkdir(parents=True)
    stream = StreamPlan(name="vision", shape=(1, 48, 2, 4, 4), rate=12.0, known=(0,))
    plan = SimpleNamespace(streams=(stream,), parameters=SimpleNamespace(fps=12.0))
    with pytest.raises(error):
        prepare(job, cast("Plan", plan), before, journal)
    assert not journal.folder("b").exists()
    journal.close()


def test_the_last_frame_outlives_its_video(tmp_path: Path) -> None:
    """From when the request is checked; of a video that is gone by then it says so."""
    journal = Journal(tmp_path)
    effective = {"fps": 12.0, "num_frames": 5}
    before = VideoJob(id="a", kind="video", model="m", prompt="", created=0.0, effective=effective)
    asked = ClientRequest(fields={"prompt": "a"}, server_fields={}, references={}, warnings=())
    journal.folder("a").mkdir(parents=True)
    Image.new("RGB", (96, 64), "red").save(journal.folder("a") / LAST)
    going_on, media = continue_from(asked, {}, before, journal)
    journal.purge("a")
    assert read_image(media["image"])[0, 0].tolist() == [255, 0, 0]
    assert (going_on.fields["size"], going_on.fields["fps"]) == ("96x64", 12.0)
    with pytest.raises(ApiError, match="was deleted") as caught:
        continue_from(asked, {}, before, journal)
    assert (caught.value.code, caught.value.param) == ("expired", "continue_from")
    journal.close()


def test_without_a_reasoner_prompts_stay(generator_server: Server) -> None:
    wanted = (400, "unsupported", "upsample_prompt")
    assert refused(generator_server, upsample_prompt=True) == wanted
    assert refused(generator_server, prompt_upsampling=True)[:2] == wanted[:2]
    path = "/v1/images/generations"
    assert refused(generator_server, path, upsample_prompt=True, num_frames=1) == wanted
    assert refused(generator_server, upsample_prompt="yes") == (400, "invalid_type", "upsample_prompt")  # fmt: skip
    job = create(generator_server, **SMALL, upsample_prompt=False)
    assert job["cosmos3"]["upsampled_prompt"] is None
