"""Checkpoints that many tests read, and processes for code that runs on several ranks.

Nobody writes into a checkpoint: copy the folder to change it.
"""

from __future__ import annotations

import gc
import os
import ssl
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import forked_stages
import httpx
import pytest
import torch
from hypothesis import settings
from limits import HANG
from lora_files import of_reasoner
from ranks import Ranks
from s3_server import BUCKET, s3_server
from servers import ARCHITECTURE, BIN, SMALL, Server, end_servers, running

from vllm_cosmos3.checkpoint.synthetic import write_checkpoint
from vllm_cosmos3.compat import has_serve_flag

# A machine that runs three processes is late now and then.
settings.register_profile("shared", deadline=None)
settings.load_profile("shared")

if not torch.cuda.is_available():
    # vLLM would compile small functions in every process, which takes ten seconds each.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"

# httpx gives up after five seconds, which a server of a busy machine may take.
for phase in ("connect", "read", "write", "pool"):
    setattr(httpx._config.DEFAULT_TIMEOUT_CONFIG, phase, HANG)

# Each client of httpx reads the certificates of all authorities, ten times as long as a request takes.
ssl.create_default_context = cache(ssl.create_default_context)

# Files that use the same server or the same ranks. The dearest groups and files come first, so that
# what is left for the end is short and all processes end together.
SHARED = {
    "generator server": ("tests/serve_generator", "tests/server"),
    "reasoner server": ("tests/serve_reasoner", "tests/examples", "tests/parity/test_reasoner.py"),
    "ranks": (
        "tests/parallel",
        "tests/stage",
        "tests/generator/models/test_vae.py",
        "tests/generator/models/test_towers.py",
        "tests/generator/models/test_fp8_layers.py",
        "tests/generator/sampling",
        "tests/generator/memory/test_reservation.py",
        "tests/generator/memory/test_memory_measured.py",
        "tests/truth/test_placements.py",
        "tests/parity/test_lora.py",
        "tests/benchmarks/test_whole_requests.py",
    ),
    "trained checkpoint": ("tests/truth",),
}
DEAR = (
    "tests/cli/test_batch_files.py",
    "tests/training",
    "tests/parity/test_checkpoint_layout.py",
    "tests/benchmarks",
    "tests/parity",
    "tests/generator",
    "tests/cli",
)
POOL = Ranks()
NO_BROWSER = "VLLM_COSMOS3_NO_BROWSER"  # an environment variable of those who have none


def pytest_report_header() -> list[str]:
    """Say why the tests for GPUs and those of pages are not there, where they are not."""
    gpu = [] if torch.cuda.is_available() else ["tests/gpu: not collected, no CUDA device here"]
    return gpu + ([f"tests of pages: left out by {NO_BROWSER}"] if NO_BROWSER in os.environ else [])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The dearest tests first. Leave those of pages out where the user wants it."""
    order = [*SHARED, *DEAR]

    def place(item: pytest.Item) -> int:
        name = group(item.nodeid)
        return next((order.index(one) for one in order if name.startswith(one)), len(order))

    items.sort(key=place)
    if NO_BROWSER in os.environ:
        left = [item for item in items if item.get_closest_marker("browser")]
        items[:] = [item for item in items if item not in left]
        config.hook.pytest_deselected(items=left)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One process for each large group, as far as there are cores and memory for its servers."""
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(len(SHARED), cores, memory // (7 * 2**30)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Files that use the same server or the same ranks run in one process, one after the other."""
    from xdist.scheduler import LoadScopeScheduling  # here, as one process does without xdist

    class ByServer(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    config.option.loadscopereorder = False  # by number of tests, which says little
    return ByServer(config, log)


def group(nodeid: str) -> str:
    """Of what a test shares, or else its file."""
    file = nodeid.split("::")[0]
    return next((name for name, files in SHARED.items() if file.startswith(files)), file)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Modules are no garbage: looking for some while they are imported takes a fifth of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """On a CPU vLLM sets this wherever a configuration is made, and it would be inherited: processes
    that start afresh import vLLM again, which takes ten times as long as forking."""
    os.environ.pop("VLLM_WORKER_MULTIPROC_METHOD", None)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End servers and ranks that no later test needs: each has a dozen threads that look for messages."""
    if nextitem is None or group(nextitem.nodeid) != group(item.nodeid):
        end_servers()
        POOL.stop()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint in the published layout and dtypes."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    write_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint_fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint with float32 tensors, for comparisons with a reference."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-float32"
    write_checkpoint(folder, dtype="float32")
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint_fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint as its FP8 revision would be, the rest in float32."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-fp8"
    write_checkpoint(folder, dtype="float32", quantization="fp8")
    return folder


@pytest.fixture(scope="session")
def tiny_edge_fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of Edge in the published layout, with float32 tensors."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-of-nemotron"
    write_checkpoint(folder, kind="edge", dtype="float32")
    return folder


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Runs a function on every rank of a mesh: ``ranks(parallel, function, *args)``."""
    yield POOL
    POOL.close()


@pytest.fixture(scope="session", autouse=True)
def stages_are_forked() -> Iterator[None]:
    """Of the clients of this process; elsewhere a CUDA device might be in use before the fork."""
    if torch.cuda.is_available():
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm_cosmos3.stage.client.start_interpreter", forked_stages.start)
        yield


@pytest.fixture(scope="session")
def vllm_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What vLLM keeps between starts; the servers of all processes of a run share it."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "vllm-cache"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """URL of a bucket on an S3 server of this machine, which is that of the environment from then on."""
    with s3_server() as settings, pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        yield f"s3://{BUCKET}"


@pytest.fixture(scope="session")
def media_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where servers may read ``file://`` URLs."""
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="session")
def reasoner_server(
    tiny_checkpoint_fp32: Path,
    media_folder: Path,
    vllm_cache: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    """The documented stock command, in float32, with the reasoning parser."""
    command = [str(BIN / "vllm"), "serve", str(tiny_checkpoint_fp32)]
    command += ["--hf-overrides", ARCHITECTURE, "--tensor-parallel-size", "1"]
    command += ["--mm-encoder-tp-mode", "data", "--async-scheduling"]
    command += ["--allowed-local-media-path", str(media_folder)]
    command += ["--media-io-kwargs", '{"video": {"num_frames": -1}}']
    if has_serve_flag("trust-request-mm-kwargs"):
        command.append("--trust-request-mm-kwargs")
    command += ["--reasoning-parser", "cosmos3", "--max-logprobs", "-1", *SMALL]
    # A random model would pad JSON with blanks for ever.
    command += ["--structured-outputs-config.disable_any_whitespace=true"]
    command += ["--structured-outputs-config.backend=xgrammar"]
    with running(command, tmp_path_factory.mktemp("server"), vllm_cache) as server:
        yield server


@pytest.fixture(scope="session")
def reasoner_adapters(
    tiny_checkpoint_fp32: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A LoRA adapter of the reasoner, in two dialects."""
    return of_reasoner(tmp_path_factory.mktemp("lora"), tiny_checkpoint_fp32)


@pytest.fixture(scope="session")
def reasoner_server_tp2(
    tiny_checkpoint_fp32: Path,
    reasoner_adapters: tuple[Path, Path],
    media_folder: Path,
    vllm_cache: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    """``vllm-cosmos3 serve`` with two ranks, and vLLM's own LoRA."""
    command = [str(BIN / "vllm-cosmos3"), "serve", str(tiny_checkpoint_fp32)]
    command += ["--surface", "reasoner", "--tensor-parallel-size", "2", "--max-video-fps", "8"]
    command += ["--allowed-local-media-path", str(media_folder), "--max-logprobs", "-1", *SMALL]
    command += ["--enable-lora", "--max-lora-rank", "8", "--lora-modules"]
    command += [f"{folder.name}={folder}" for folder in reasoner_adapters]
    command.append("--allow-private-media")
    with running(command, tmp_path_factory.mktemp("server"), vllm_cache) as server:
        yield server
