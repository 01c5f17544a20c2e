"""Drive a DROID robot by a policy: python droid_policy_client.py ws://127.0.0.1:8000 "pick it up"

Needs `pip install openpi-client typing_extensions`, and a server:
vllm-cosmos3 serve nvidia/Cosmos3-Nano-Policy-DROID --surface generator
"""

import os
import sys

import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy

url = sys.argv[1] if len(sys.argv) > 1 else "ws://127.0.0.1:8000"
prompt = sys.argv[2] if len(sys.argv) > 2 else "put the cup on the plate"

policy = WebsocketClientPolicy(url, api_key=os.environ.get("VLLM_API_KEY"))
print("the server wants", policy.get_server_metadata())


def camera(name: str) -> np.ndarray:
    """A picture of this camera, 720x1280 like those of DROID: put your own here."""
    return np.full((720, 1280, 3), 30 * len(name) % 256, np.uint8)


joints = np.array([0.0, -0.6, 0.0, -2.5, 0.0, 1.9, 0.0], np.float32)
gripper = np.zeros(1, np.float32)
for step in range(2):
    observation = {f"observation/{name}": camera(name) for name in (
        "wrist_image_left", "exterior_image_1_left", "exterior_image_2_left"
    )}  # fmt: skip
    observation |= {"observation/joint_position": joints, "observation/gripper_position": gripper}
    answer = policy.infer(observation | {"prompt": prompt, "session_id": "an episode"})
    actions = answer["actions"]  # [32, 8]: joint positions [rad] and the gripper, 15 a second
    print(f"{step}: {actions.shape} in {answer['server_timing']['infer_ms']:.0f} ms")
    joints, gripper = actions[-1, :7], actions[-1, 7:]  # a real robot moves there
