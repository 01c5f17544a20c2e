"""Robots at the policy WebSocket: openpi-client in its own environment, and a second client."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from browsing import READY, browsing, check_accessibility, visiting
from generators import eventually, idle, suspended
from limits import HANG
from playwright.sync_api import expect
from robots import KEY, PATH, Refused, Robot, observation, robot
from servers import Server
from websockets.exceptions import ConnectionClosed, InvalidStatus

from vllm_cosmos3.robots import droid

pytestmark = pytest.mark.serve
ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "generator" / "droid_policy_client.py"
WRIST, ARM, GRIPPER = droid.WRIST, droid.ARM, droid.GRIPPER
METADATA = {
    "image_resolution": [540, 640],
    "n_external_cameras": 2,
    "needs_wrist_camera": True,
    "needs_stereo_camera": False,
    "needs_session_id": True,
    "action_space": "joint_position",
}
OPENPI = """
import sys
import numpy as np
from openpi_client import action_chunk_broker, websocket_client_policy

url, key = sys.argv[1:]
policy = websocket_client_policy.WebsocketClientPolicy(url, api_key=key)
print(sorted(policy.get_server_metadata()))
view = np.zeros((224, 224, 3), np.uint8)
seen = {
    "prompt": "go", "session_id": "s",
    "observation/wrist_image_left": view,
    "observation/exterior_image_1_left": view,
    "observation/exterior_image_2_left": view,
    "observation/joint_position": np.zeros(7),
    "observation/gripper_position": np.float64(1),
    "sampling_params": {"num_inference_steps": 1},
}
try:
    policy.infer({k: v for k, v in seen.items() if "gripper" not in k})
except RuntimeError as error:
    print("refused", "observation/gripper_position is missing" in str(error))
answer = policy.infer(seen)
print(answer["actions"].shape, answer["actions"].dtype, answer["server_timing"]["infer_ms"] > 0)
print(policy.infer({"endpoint": "reset", "session_id": "s"}))
again = policy.infer(seen)
print((again["actions"] == answer["actions"]).all())
"""


def openpi_client(python: Path, *arguments: str) -> str:
    done = subprocess.run(
        [str(python), *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=HANG,
        env={"PATH": os.environ["PATH"], "VLLM_API_KEY": KEY},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def refusal(arm: Robot, message: Any) -> dict[str, Any]:
    with pytest.raises(Refused) as refused:
        arm.ask(message)
    return refused.value.error


def test_openpi_client(robot_server: Server, openpi_python: Path) -> None:
    output = openpi_client(openpi_python, "-c", OPENPI, robot_server.url.replace("http", "ws"), KEY)
    metadata, refused, shape, reset, again = output.splitlines()
    assert metadata == str(sorted(METADATA))
    assert refused == "refused True"
    assert shape == "(32, 8) float32 True"
    assert reset == "{'status': 'reset successful'}"
    assert again == "True"


def test_the_example_while_an_idle_robot_is_let_go(
    robot_server: Server, openpi_python: Path
) -> None:
    url = robot_server.url.replace("http", "ws")
    with robot(robot_server.url) as idle:
        output = openpi_client(openpi_python, str(EXAMPLE), url, "open the drawer")
        with pytest.raises(ConnectionClosed, match="no message for 12 seconds"):
            idle.receive()
    assert output.splitlines()[1].startswith("0: (32, 8) in ")


def test_replies_are_maps_at_the_root_and_arrays_elsewhere(robot_server: Server) -> None:
    answers = {}
    for path in ("/", "/?reply=array", PATH, f"{PATH}?reply=dict"):
        with robot(robot_server.url, path) as arm:
            assert arm.metadata == METADATA
            answers[path] = arm.ask(observation(seed=3))
    whole = answers["/"]
    assert whole["seed"] == 3
    assert whole["server_timing"].keys() >= {"infer_ms", "queue_ms", "denoise_ms"}
    actions = whole["actions"]
    assert actions.shape == (32, 8)
    assert actions.dtype == np.float32
    assert np.isfinite(actions).all()
    for other in (whole["action"], answers["/?reply=array"], answers[PATH]):
        np.testing.assert_array_equal(other, actions)
    np.testing.assert_array_equal(answers[f"{PATH}?reply=dict"]["actions"], actions)


def test_an_episode_can_be_repeated(robot_server: Server) -> None:
    with robot(robot_server.url) as arm:
        first, second = (arm.ask(observation(session_id="a")) for _ in range(2))
        assert arm.ask({"endpoint": "reset", "session_id": "a"}) == {"status": "reset successful"}
    with robot(robot_server.url) as arm:  # the session outlives the connection
        again = arm.ask(observation(session_id="a"))
        other = arm.ask(observation(session_id="b"))
    assert again["seed"] == first["seed"] != second["seed"]
    assert other["seed"] not in (first["seed"], second["seed"])
    np.testing.assert_array_equal(again["actions"], first["actions"])
    assert not np.array_equal(second["actions"], first["actions"])


def test_actions_depend_on_what_the_robot_sees_and_measures(robot_server: Server) -> None:
    with robot(robot_server.url) as arm:
        usual = arm.ask(observation(seed=1))["actions"]
        for changes in (
            {"prompt": "open the drawer"},
            {WRIST: np.zeros((90, 160, 3), np.uint8)},
            {ARM: np.zeros(7)},
            {GRIPPER: 1},
            {"sampling_params": {"num_inference_steps": 2}},
        ):
            other = arm.ask(observation(seed=1, **changes))["actions"]
            assert not np.array_equal(other, usual), changes


BAD = {
    "text": ("not msgpack", "message", "invalid_type"),
    "noise": (b"\xc1\xc1", "message", "invalid_value"),
    "a list": (b"\x90", "message", "invalid_type"),
    "too large": (bytes(64 * 2**20 + 1), "message", "payload_too_large"),
    "endpoint": ({"endpoint": "train"}, "endpoint", "invalid_value"),
    "nothing": ({}, "prompt", "missing_required"),
    "no gripper": (observation(**{GRIPPER: None}), GRIPPER, "missing_required"),
    "no view": (observation(**{WRIST: None}), WRIST, "missing_required"),
    "a flat view": (observation(**{WRIST: np.zeros((90, 160), np.uint8)}), WRIST, "invalid_type"),
    "a view of floats": (observation(**{WRIST: np.zeros((90, 160, 3))}), WRIST, "invalid_type"),
    "six joints": (observation(**{ARM: np.zeros(6)}), ARM, "invalid_type"),
    "not a number": (observation(**{ARM: np.full(7, np.nan)}), ARM, "invalid_value"),
    "an empty prompt": (observation(prompt=" "), "prompt", "invalid_value"),
    "a number as prompt": (observation(prompt=1), "prompt", "invalid_type"),
    "a seed of text": (observation(seed="x"), "seed", "invalid_type"),
    "too many steps": (observation(sampling_params={"num_inference_steps": 10**6}), "num_inference_steps", "invalid_value"),
    "an unknown parameter": (observation(sampling_params={"steps": 4}), "sampling_params.steps", "invalid_value"),
    "a session that is a map": (observation(session_id={}), "session_id", "invalid_type"),
}  # fmt: skip


def test_errors_name_the_key_and_the_connection_stays(robot_server: Server) -> None:
    """Row 104 of the catalogue of bad input."""
    with robot(robot_server.url) as arm:
        for name, (message, key, code) in BAD.items():
            error = refusal(arm, message)
            assert (error["param"], error["code"]) == (key, code), name
            assert key in error["message"], name
        assert arm.ask(observation())["actions"].shape == (32, 8)


def test_a_robot_without_a_key_stays_outside(robot_server: Server) -> None:
    for path in ("/", PATH):
        for authorization in (None, "Bearer wrong", f"Basic {KEY}"):
            with (
                pytest.raises(InvalidStatus) as refused,
                robot(robot_server.url, path, authorization),
            ):
                pass
            assert refused.value.response.status_code == 401
        with robot(robot_server.url, path, f"Bearer {KEY}") as arm:
            assert arm.metadata == METADATA


def test_a_base_checkpoint_is_no_policy(generator_server: Server) -> None:
    """Row 105 of the catalogue of bad input."""
    for path in ("/", PATH):
        with pytest.raises(ConnectionClosed) as closed, robot(generator_server.url, path):
            pass
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1008
        assert "Cosmos3-Nano-Policy-DROID" in closed.value.rcvd.reason


def test_an_unknown_shape_of_replies(robot_server: Server) -> None:
    refused = pytest.raises(ConnectionClosed, match="must be dict or array")
    with refused, robot(robot_server.url, "/?reply=json"):
        pass


def test_several_robots_are_served_one_after_the_other(robot_server: Server) -> None:
    idle(robot_server)
    asked = observation(seed=5, sampling_params={"num_inference_steps": 3})
    with robot(robot_server.url) as one, robot(robot_server.url) as other:
        with suspended(robot_server):  # the first is not done before the second has come
            one.send(asked)
            eventually(lambda: queue(robot_server)["running"] == 1)
            other.send(asked)
            eventually(lambda: queue(robot_server)["waiting"] == 1)
        first, second = one.receive(), other.receive()
    np.testing.assert_array_equal(first["actions"], second["actions"])
    times = [answer["server_timing"] for answer in (first, second)]
    assert times[1]["queue_ms"] > times[0]["denoise_ms"] / 2  # in turns nobody waits for long


def queue(server: Server) -> dict[str, int]:
    """How many requests run and wait."""
    found: dict[str, int] = httpx.get(f"{server.url}/health").json()["queue"]
    return found


def served(arm: Robot) -> list[str]:
    """Why a robot that has asked, and asks again, was refused until it was served."""
    codes = []
    while True:
        try:
            assert arm.receive()["actions"].shape == (32, 8)
            return codes
        except Refused as error:
            codes.append(error.error["code"])
        time.sleep(0.1)
        arm.send(observation())


def test_a_robot_too_many_is_told_and_may_ask_again(robot_server: Server) -> None:
    idle(robot_server)
    before = queue_full(robot_server)
    with ExitStack() as stack:
        robots = [stack.enter_context(robot(robot_server.url)) for _ in range(8)]
        with ThreadPoolExecutor(len(robots)) as pool:
            with suspended(robot_server):  # nobody is served before all places are taken
                robots[0].send(observation())
                eventually(lambda: queue(robot_server)["running"] == 1)  # it waits no longer
                for arm in robots[1:]:
                    arm.send(observation())
                answers = pool.map(served, robots)
                eventually(lambda: queue_full(robot_server) > before)
            refusals = list(answers)
    assert 1 <= sum(map(bool, refusals)) <= 5  # one is served and two wait, at least
    assert {code for codes in refusals for code in codes} == {"queue_full"}


def queue_full(server: Server) -> float:
    """How many were refused for that."""
    page = httpx.get(f"{server.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    (count,) = re.findall(r'requests_rejected_total{reason="queue_full"} (\S+)', page)
    return float(count)


def test_a_robot_that_goes_away_is_cancelled(robot_server: Server) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}

    def value(family: str) -> float:
        page = httpx.get(f"{robot_server.url}/metrics", headers=headers).text
        (line,) = [line for line in page.splitlines() if line.startswith(f"{family} ")]
        return float(line.split()[1])

    def wait_until_running(count: int) -> None:
        eventually(lambda: value("cosmos3:requests_running") == count)

    wait_until_running(0)  # the last test's request may still be counted when it was answered
    before = value("cosmos3:requests_cancelled_total")
    with robot(robot_server.url) as arm:
        arm.send(observation(sampling_params={"num_inference_steps": 200}))
        wait_until_running(1)
    eventually(lambda: value("cosmos3:requests_cancelled_total") > before)
    assert value("cosmos3:requests_cancelled_total") == before + 1
    with robot(robot_server.url) as arm:
        assert arm.ask(observation())["actions"].shape == (32, 8)


def test_a_robot_is_served_when_a_trainer_goes_away_in_an_update(robot_server: Server) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    options: dict[str, Any] = {"base_url": robot_server.url, "headers": headers, "timeout": HANG}
    with httpx.Client(**options) as trainer, robot(robot_server.url) as arm:
        before = arm.ask(observation(seed=1))["actions"]
        assert trainer.post("/v1/cosmos3/start_weight_update").status_code == 200
        after = arm.ask(observation(seed=1))["actions"]  # when the update is given up
        np.testing.assert_array_equal(after, before)
        given_up = "cosmos3:weight_updates_given_up 1.0"
        eventually(lambda: given_up in trainer.get("/metrics").text)
        assert trainer.get("/health").json()["surfaces"]["generator"] == "ready"
        body = {"update_info": {"path": f"{robot_server.model}/transformer"}}
        late = trainer.post("/v1/cosmos3/update_weights", json=body)
        assert late.status_code == 400
        assert "given up, with the old weights, after 1 s without a call" in late.text


def test_the_load_generator_of_robots(robot_server: Server, tmp_path: Path) -> None:
    fields = {"sampling_params": {"num_inference_steps": 1}}
    command = [sys.executable, str(ROOT / "benchmarks" / "serving.py"), "--kind", "actions"]
    command += [
        "--url",
        robot_server.url,
        "--api-key",
        KEY,
        "--requests",
        "4",
        "--concurrency",
        "2",
    ]
    command += ["--fields", json.dumps(fields), "--json", str(tmp_path / "report.json")]
    subprocess.run(command, check=True, timeout=HANG)
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["requests"], report["errors"]) == (4, 0)
    assert 0 < report["gpu_seconds_per_output"] < report["latency_s"]["p99"]
    assert report["queue_s"]["p99"] > report["queue_s"]["p50"]


@pytest.mark.browser
def test_the_playground_behind_a_key_and_a_root_path(robot_server: Server) -> None:
    with browsing() as browser, visiting(browser) as context:
        page = context.new_page()
        for path in ("/studio", "/"):  # with the prefix of a proxy, and without
            page.goto(f"{robot_server.url}{path}")
            expect(page.locator("#key-dialog")).to_be_visible()
            assert page.evaluate("document.baseURI") == f"{robot_server.url}/studio/"
        check_accessibility(page)
        page.fill("#key", "wrong")
        page.locator("#key").press("Enter")
        expect(page.locator("#key-error")).to_have_text("The server does not know this key.")
        page.fill("#key", KEY)
        page.locator("#key").press("Enter")
        page.wait_for_selector(READY)
        expect(page.locator("#modes label")).to_have_text(["Robot policy"])
        assert page.input_value("#domain") == "droid_lerobot"
        kept = page.evaluate(
            "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])"
        )
        assert KEY not in kept
        page.goto(f"{robot_server.url}/studio/docs")
        expect(page.get_by_role("button", name="Authorize")).to_be_visible()


def test_health_and_the_page_of_the_route(robot_server: Server) -> None:
    assert httpx.get(f"{robot_server.url}/healthz").json()["status"] == "healthy"
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = httpx.get(f"{robot_server.url}{PATH}", headers=headers)
    assert (answer.status_code, answer.headers["upgrade"]) == (426, "websocket")
    (model,) = httpx.get(f"{robot_server.url}/v1/models", headers=headers).json()["data"]
    assert model["cosmos3"]["robot"] == METADATA | {
        "action_shape": [32, 8],
        "actions_per_second": 15.0,
    }
    assert (
        f"/ or ws://127.0.0.1:{robot_server.url.rsplit(':')[-1]}{PATH}"
        in robot_server.log.read_text()
    )
    assert PATH in httpx.get(f"{robot_server.url}/openapi.json").json()["paths"]


def test_a_policy_of_lerobot(robot_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    path = ROOT / "examples" / "lerobot" / "lerobot_policy.py"
    example = runpy.run_path(str(path), run_name="example")
    policy = example["Cosmos3Policy"](robot_server.url.replace("http", "ws"), steps=2)
    batch: dict[str, Any] = {name: torch.ones(1, 3, 90, 160) / 2 for name in example["CAMERAS"]}
    batch |= {"observation.state": torch.zeros(1, 8), "task": ["pick it up"]}
    episodes = []
    for _ in range(2):
        policy.reset()
        episodes.append([policy.select_action(batch) for _ in range(3)])
    for first, second in zip(*episodes, strict=True):
        assert (tuple(first.shape), first.dtype) == ((1, 8), torch.float32)
        assert (first == second).all()  # a reset restarts the seeds
    policy.reset()
    with pytest.raises(RuntimeError, match="observation/joint_position"):
        policy.select_action(batch | {"observation.state": torch.zeros(1, 3)})
    policy.close()
