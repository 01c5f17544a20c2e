"""Input frames of requests: resized one by one, and never more memory than the budget says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from limits import HANG
from PIL import Image

from vllm_cosmos3 import media
from vllm_cosmos3.checkpoint.config import read_config
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.media_budget import LIMIT
from vllm_cosmos3.request.planner import make_draft
from vllm_cosmos3.request.request import GenerateRequest

MIB = 2**20
# Plans requests at once, in as many threads, and says what came of them and what they took.
PLAN = """if True:
    import json, sys, threading
    from pathlib import Path
    import numpy as np
    import torch
    from vllm_cosmos3.checkpoint.config import read_config
    from vllm_cosmos3.errors import Busy, InvalidRequest
    from vllm_cosmos3.request.planner import make_draft
    from vllm_cosmos3.request.request import GenerateRequest

    model = read_config(Path(sys.argv[1]))
    common = {"prompt": "a", "size": "320x192", "num_frames": 61}
    outcomes = []

    def peak():  # getrusage begins with that of the process by which this one was started
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])

    def plan(fields):
        try:
            make_draft(GenerateRequest(**common, **fields), model)
            outcomes.append("planned")
        except (Busy, InvalidRequest) as error:
            outcomes.append(error.code)

    plan({"image": np.zeros((64, 64, 3), np.uint8)})
    before = peak()
    threads = [threading.Thread(target=plan, args=(fields,)) for fields in json.loads(sys.argv[2])]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    taken = peak() - before
    print(json.dumps([outcomes[1:], taken * 1024]))
"""


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("film") / "grey.mp4"
    media.write_video(path, np.full((61, 1088, 1920, 3), 99, np.uint8), fps=24, crf=40)
    return path


def planned(
    folder: Path, requests: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch, gib: str
) -> tuple[list[str], int]:
    monkeypatch.setenv(LIMIT, gib)
    command = [sys.executable, "-c", PLAN, str(folder), json.dumps(requests)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=HANG)
    outcomes, taken = json.loads(done.stdout)
    return outcomes, taken


def test_a_long_clip_takes_as_much_as_its_frames_in_the_output(
    film: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known: dict[str, object] = {"video": str(film), "condition_frame_indexes_vision": [0, 14]}
    outcomes, taken = planned(tiny_checkpoint, [known], monkeypatch, "8")
    assert outcomes == ["planned"]
    assert 0 < taken < 200 * MIB  # 57 frames of it are 357 MiB, and were held twice


def test_eight_requests_of_the_worst_media_stay_within_the_budget(
    film: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (8192, 8192)).save(tmp_path / "large.png")  # 1 GiB while it is decoded
    Image.new("RGB", (2000, 2000)).save(tmp_path / "p.tiff", compression="tiff_adobe_deflate")
    requests: list[dict[str, object]] = [{"image": str(tmp_path / "large.png")}] * 2
    requests += [{"image": str(tmp_path / "p.tiff")}] * 3 + [{"video": str(film)}] * 3
    outcomes, taken = planned(tiny_checkpoint, requests, monkeypatch, "0.25")
    assert outcomes.count("payload_too_large") == 2
    assert set(outcomes) <= {"payload_too_large", "planned", "busy"}
    assert "planned" in outcomes
    assert 0 < taken < 300 * MIB


def test_frames_of_several_sizes_are_refused(tiny_checkpoint: Path) -> None:
    clip = [np.zeros((64, 64, 3), np.uint8)] * 4 + [np.zeros((64, 80, 3), np.uint8)]
    request = GenerateRequest(prompt="a", video=clip, size="64x64", num_frames=25)
    with pytest.raises(InvalidRequest, match="frames of one size"):
        make_draft(request, read_config(tiny_checkpoint))


@pytest.mark.parametrize("keep", ["first", "last"])
@pytest.mark.parametrize("as_file", [False, True])
def test_the_known_frames_are_those_at_the_chosen_end(
    tiny_checkpoint: Path, tmp_path: Path, keep: str, as_file: bool
) -> None:
    levels = np.arange(12, dtype=np.uint8)[:, None, None, None] * 20
    clip = np.broadcast_to(levels, (12, 64, 64, 3)).copy()
    media.write_video(tmp_path / "v.mp4", clip, fps=24, crf=0)
    request = GenerateRequest(
        prompt="a", video=tmp_path / "v.mp4" if as_file else clip, size="64x64", num_frames=25,
        condition_video_keep=keep,  # type: ignore[arg-type]
    )  # fmt: skip
    source = make_draft(request, read_config(tiny_checkpoint)).chunks[0][0].source
    assert source is not None
    wanted = clip[:5] if keep == "first" else clip[-5:]
    assert np.abs(source.astype(int) - wanted.astype(int)).max() <= 2
