"""Results that are files of another host: delivered as if they had been made here."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from vllm_cosmos3.stage.parcels import packed, saved_elsewhere
from vllm_cosmos3.stage.ray_cluster import strategy_of


def test_a_folder_is_afterwards_what_it_is_there(tmp_path: Path) -> None:
    """As with a video that goes on from another, which the first rank joins and takes away."""
    here = tmp_path / "job"
    here.mkdir()
    (here / "before.mp4").write_bytes(b"first ")

    def save(folder: Path) -> list[Path]:
        assert folder != here
        whole = (folder / "before.mp4").read_bytes() + b"second"
        (folder / "before.mp4").unlink()
        (folder / "small").mkdir()
        (folder / "small" / "one.webp").write_bytes(b"1")
        (folder / "video.mp4").write_bytes(whole)
        return [folder / "video.mp4"]

    parcel = pickle.loads(pickle.dumps(saved_elsewhere(save, here, packed(here))))
    assert [file.name for file in here.iterdir()] == ["before.mp4"]  # so far
    assert parcel.deliver(here) == [here / "video.mp4"]
    assert packed(here) == {"job/video.mp4": b"first second", "job/small/one.webp": b"1"}


def test_a_result_may_be_a_file_by_itself(tmp_path: Path) -> None:
    def save(file: Path) -> list[Path]:
        file.write_text("4")
        return [file]

    path = tmp_path / "total"
    assert saved_elsewhere(save, path, packed(path)).deliver(path) == [path]
    assert path.read_text() == "4"


@pytest.mark.parametrize(
    ("ranks", "devices", "strategy"),
    [(4, (4.0, 2.0), "STRICT_PACK"), (8, (4.0, 4.0), "PACK"), (1, (), "PACK")],
)
def test_a_mesh_is_spread_only_where_no_host_is_large_enough(
    ranks: int, devices: tuple[float, ...], strategy: str
) -> None:
    assert strategy_of(ranks, devices) == strategy
