"""Finding a checkpoint, against a small hub on the loopback address that speaks the real protocol."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from limits import HANG
from safetensors.torch import save_file

from vllm_cosmos3.checkpoint import hub as hub_module
from vllm_cosmos3.checkpoint.config import read_config
from vllm_cosmos3.checkpoint.hub import SHORT_NAMES, full_name, resolve
from vllm_cosmos3.checkpoint.synthetic import write_checkpoint
from vllm_cosmos3.errors import CheckpointError

DERIVED = {"demo-4step": "distilled-i2v", "demo-policy": "policy-droid"}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_secret"

# huggingface_hub reads its environment once, at import: every case is a process of its own.
SCRIPT = """
import json, sys
from vllm_cosmos3.errors import Cosmos3Error
from vllm_cosmos3.checkpoint.hub import resolve
try:
    print(json.dumps(["ok", str(resolve(sys.argv[1], json.loads(sys.argv[2])))]))
except Cosmos3Error as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""


@dataclass
class Hub:
    """Repositories by name, what was asked for, and how to ask."""

    repositories: dict[str, Path]
    cache: Path
    url: str = ""
    asked: list[str] = field(default_factory=list)

    def resolve(
        self, model: str, revision: str | None = None, **environment: str
    ) -> tuple[str, str]:
        base = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        asked = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(self.cache),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "1",
        }
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, model, json.dumps(revision)],
            env=base | asked | environment,
            capture_output=True,
            text=True,
            timeout=HANG,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        kind, text = json.loads(done.stdout)
        return kind, text


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("repositories")
    write_checkpoint(root / "tiny")
    write_checkpoint(root / "many")
    write_checkpoint(root / "silent", kind="distilled-t2i")
    config = root / "many" / "transformer" / "config.json"
    several = {"backbone_type": "cosmos3_multiview"}
    config.write_text(json.dumps(json.loads(config.read_text()) | several))
    names = ("tiny", "many", "silent")
    return {f"team/{name}": root / name for name in names} | {"team/private": root / "tiny"}


@pytest.fixture
def hub(repositories: dict[str, Path], tmp_path: Path) -> Iterator[Hub]:
    found = Hub(repositories=repositories, cache=tmp_path / "cache")
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(found))
    found.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield found
    server.shutdown()
    thread.join()
    server.server_close()


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            hub.asked.append(path)
            api = path.startswith("/api/models/")
            parts = path.removeprefix("/api/models").strip("/").split("/")
            name, verb, rest = "/".join(parts[:2]), parts[2], parts[3:]
            folder = hub.repositories.get(name)
            authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            if name == "team/gated":
                self.refuse(403, "GatedRepo")
            elif name == "team/broken":
                self.refuse(500, "")
            elif folder is None or (name == "team/private" and not authorized):
                self.refuse(401, "RepoNotFound")
            elif rest[0] not in ("main", COMMIT):
                self.refuse(404, "RevisionNotFound")
            elif api and verb == "revision":
                siblings = [{"rfilename": entry["path"]} for entry in listing(folder)]
                self.json({"id": name, "sha": COMMIT, "siblings": siblings})
            elif api:
                self.json(listing(folder))
            else:
                self.content((folder / "/".join(rest[1:])).read_bytes())

        def do_HEAD(self) -> None:
            self.do_GET()

        def json(self, value: object) -> None:
            self.content(json.dumps(value).encode(), "application/json")

        def refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def content(self, body: bytes, kind: str = "application/octet-stream") -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing: ``hub.asked`` has it."""

    return Handler


def listing(folder: Path) -> list[dict[str, object]]:
    return [
        {
            "type": "file",
            "path": path.relative_to(folder).as_posix(),
            "size": path.stat().st_size,
            "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]


def test_a_folder_is_itself(tiny_checkpoint: Path) -> None:
    assert resolve(tiny_checkpoint) == tiny_checkpoint
    assert resolve(str(tiny_checkpoint)) == tiny_checkpoint
    with pytest.raises(CheckpointError, match="revision 'fp8' needs a repository"):
        resolve(tiny_checkpoint, "fp8")


@pytest.mark.parametrize("name", sorted({*SHORT_NAMES} - {*DERIVED}))
def test_a_short_name_is_what_it_stands_for(name: str) -> None:
    assert full_name(name) == str(SHORT_NAMES[name])
    assert full_name(f"./{name}") == f"./{name}"


@pytest.mark.parametrize("name", DERIVED)
def test_a_short_name_stands_for_a_complete_folder(
    name: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clone's folder says what differs from the demo, which has tiny weights here."""
    clone = tmp_path / "checkpoints"
    shutil.copytree(SHORT_NAMES[name], clone / name)
    (clone / "demo").symlink_to(tiny_checkpoint)
    save_file({}, clone / name / "changed.safetensors")
    monkeypatch.setitem(SHORT_NAMES, name, clone / name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = Path(full_name(name))
    assert found == resolve(name)
    assert found.name == name
    assert read_config(found).kind == DERIVED[name]


def test_the_demo_is_a_folder_of_the_clone() -> None:
    assert resolve("demo") == Path(__file__).parents[2] / "checkpoints" / "demo"


def test_a_checkpoint_in_a_folder_of_that_name_comes_first(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()  # such as the folder of `make demo`, which holds no checkpoint
    assert resolve("demo") == SHORT_NAMES["demo"]
    (tmp_path / "demo").rmdir()
    (tmp_path / "demo").symlink_to(tiny_checkpoint)
    assert resolve("demo").resolve() == tiny_checkpoint.resolve()


@pytest.mark.parametrize("name", ["demo", *DERIVED])
def test_an_installed_package_says_where_the_demo_is(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "CLONE", tmp_path)
    monkeypatch.setitem(SHORT_NAMES, name, tmp_path / "checkpoints" / name)
    with pytest.raises(
        CheckpointError, match=rf"{name} is the folder checkpoints/{name} of this .* clone"
    ):
        resolve(name)


def test_configuration_comes_before_weights(hub: Hub) -> None:
    kind, folder = hub.resolve("team/tiny")
    assert (kind, Path(folder).name) == ("ok", COMMIT)
    present = {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*.*")}
    assert "text_tokenizer/tokenizer.json" in present
    assert {path for path in present if path.endswith(".safetensors")} == {
        "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
        "transformer/diffusion_pytorch_model-00002-of-00002.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "sound_tokenizer/diffusion_pytorch_model.safetensors",
    }
    weights = [index for index, path in enumerate(hub.asked) if path.endswith(".safetensors")]
    others = [index for index, path in enumerate(hub.asked) if path.endswith("config.json")]
    assert max(others) < min(weights)


def test_the_cache_answers_offline(hub: Hub) -> None:
    kind, message = hub.resolve("team/tiny", HF_HUB_OFFLINE="1")
    assert kind == "CheckpointError"
    assert "hub cannot be reached" in message
    online = hub.resolve("team/tiny")
    assert hub.resolve("team/tiny", HF_HUB_OFFLINE="1") == online
    assert hub.resolve("team/tiny", COMMIT, HF_HUB_OFFLINE="1") == online


def test_an_unreachable_hub(hub: Hub) -> None:
    kind, message = hub.resolve("team/tiny", HF_ENDPOINT="http://127.0.0.1:9")
    assert kind == "CheckpointError"
    assert "hub cannot be reached; check the network" in message


def test_what_cannot_run_is_refused_before_any_weights(hub: Hub) -> None:
    kind, message = hub.resolve("team/many")
    assert kind == "Unsupported"
    assert "Transfer-Auto" in message
    assert not [path for path in hub.asked if path.endswith(".safetensors")]


def test_silent_checkpoints_have_no_sound_tokenizer(hub: Hub) -> None:
    kind, folder = hub.resolve("team/silent", "main")
    assert kind == "ok"
    assert not (Path(folder) / "sound_tokenizer").exists()


def test_a_token_opens_private_repositories(hub: Hub) -> None:
    kind, message = hub.resolve("team/private")
    assert kind == "CheckpointError"
    assert "HF_TOKEN" in message
    assert hub.resolve("team/private", HF_TOKEN=TOKEN)[0] == "ok"


@pytest.mark.parametrize(
    ("model", "revision", "sentence"),
    [
        ("team/gated", None, "team/gated is gated: accept its terms on https://huggingface.co/"),
        ("team/absent", None, "team/absent is neither a folder nor a Hugging Face repository"),
        ("team/tiny", "fp9", "team/tiny has no revision 'fp9'"),
        (
            "team/broken",
            None,
            "team/broken is not a folder, not complete in the Hugging Face cache",
        ),
        (
            "dem",
            None,
            "dem is neither a folder nor a repository id such as nvidia/Cosmos3-Nano; did you mean demo?",
        ),
        ("./no/such/folder", None, "model is './no/such/folder', must be an existing folder"),
        ("~nosuchuser/folder", None, "model is '~nosuchuser/folder', must be an existing folder"),
    ],
)
def test_each_fault_is_one_sentence_with_the_fix(
    hub: Hub, model: str, revision: str | None, sentence: str
) -> None:
    kind, message = hub.resolve(model, revision)
    assert kind == "CheckpointError"
    assert message.startswith(sentence)
    assert "\n" not in message
