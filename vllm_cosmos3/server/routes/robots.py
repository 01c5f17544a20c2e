"""The WebSocket of robots: observations in, chunks of actions out, as openpi's clients speak it.

After the handshake the server sends one map of metadata. Each message of the client is a msgpack
map, answered by one message: ``endpoint`` "infer" (the default) by actions, "reset" by a status.
What cannot be served is answered by a text frame with the error envelope of the HTTP routes, and
the connection stays; openpi-client raises on text frames alone.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, WebSocket, WebSocketDisconnect
from fastapi.responses import Response

from vllm_cosmos3.checkpoint.kinds import KINDS
from vllm_cosmos3.errors import Cosmos3Error, InvalidRequest
from vllm_cosmos3.robots import droid, msgpack
from vllm_cosmos3.server.http.api_errors import ApiError, envelope
from vllm_cosmos3.server.http.keys import API_KEY, BEARER, refused
from vllm_cosmos3.server.jobs.service import Service
from vllm_cosmos3.server.openapi.responses import errors
from vllm_cosmos3.server.routes.info import health_of
from vllm_cosmos3.server.routes.route import Route

logger = logging.getLogger(__name__)
router = APIRouter(route_class=Route, tags=["Cosmos3 robots"])

PATH = "/v1/realtime/robot/openpi"
ARRAY, DICT = "array", "dict"  # shapes of a reply
MAX_MESSAGE = 64 * 2**20  # bytes
MAX_SESSIONS = 1024  # that are remembered
POLICY_CHECKPOINTS = "Cosmos3-Nano-Policy-DROID or Cosmos3-Edge-Policy-DROID"
# Codes with which a WebSocket is closed (RFC 6455 and its registry).
GOING_AWAY, POLICY_VIOLATION, TRY_AGAIN_LATER = 1001, 1008, 1013
MAX_REASON = 123  # bytes that a closing frame has room for


@router.websocket("/")
async def root(socket: WebSocket) -> None:
    """Where the Cosmos Framework and openpi serve policies: a reply is a map."""
    await _serve(socket, DICT)


@router.websocket(PATH)
async def openpi(socket: WebSocket) -> None:
    """Where vLLM-Omni serves policies: a reply is an array, ``?reply=dict`` makes it a map."""
    await _serve(socket, ARRAY)


@router.get(
    PATH,
    summary="Connect a robot",
    status_code=426,
    response_class=Response,
    responses=errors(426, "Upgrade Required"),
)
async def upgrade(request: Request) -> Response:
    """The policy of a robot, over a WebSocket: connect to ws:// with this path, or to /.

    Messages are msgpack maps as openpi-client makes them: `prompt`, `observation/image` or three
    cameras, `observation/joint_position`, `observation/gripper_position`, and optionally
    `session_id`, `seed`, `sampling_params`. The answer has `actions`, float32 [32, 8], or is that
    array with `?reply=array`. Errors are text frames.
    """
    message = f"{PATH} is a WebSocket: connect to it with openpi-client, or another client of it"
    raise ApiError("upgrade_required", message, headers={"Upgrade": "websocket"})


@router.get("/healthz", include_in_schema=False)
async def healthz(request: Request) -> Response:
    """As /health, where clients of policy servers look for it."""
    return await health_of(request)


@dataclass(slots=True)
class Session:
    """An episode of one robot: its name and how many answers it got."""

    name: str
    answers: int = 0

    @property
    def seed(self) -> int:
        """Another one for each answer, and the same ones in each episode of this name."""
        digest = hashlib.sha256(f"{self.name}:{self.answers}".encode()).digest()
        return int.from_bytes(digest[:4])


class Sessions:
    """The sessions of a server, of which the least recently used are forgotten."""

    def __init__(self) -> None:
        self._sessions: OrderedDict[str, Session] = OrderedDict()

    def get(self, name: str) -> Session:
        """The session of this name, perhaps a new one."""
        session = self._sessions.setdefault(name, Session(name))
        self._sessions.move_to_end(name)
        if len(self._sessions) > MAX_SESSIONS:
            self._sessions.popitem(last=False)
        return session


class Connection:
    """One robot. Serves one message at a time; losing the robot cancels what is being made."""

    def __init__(self, socket: WebSocket, service: Service, sessions: Sessions, reply: str) -> None:
        self._socket, self._service, self._sessions, self._reply = socket, service, sessions, reply
        self._session = Session("")  # until the client names one
        self._seconds: float | None = None  # that the last answer took
        self._incoming = asyncio.create_task(socket.receive())

    async def run(self) -> None:
        """Serve until either side goes away."""
        try:
            await self._socket.send_bytes(
                msgpack.pack(droid.metadata(self._service.options.robot_action_space))
            )
            while (message := await self._next()) is not None:
                await self._answer(message)
        except WebSocketDisconnect:
            logger.debug("a robot went away")
        finally:
            self._incoming.cancel()

    async def _next(self) -> Mapping[str, Any] | None:
        """The next message, None after the last one."""
        idle = self._service.options.robot_openpi_idle_timeout
        done, _ = await asyncio.wait({self._incoming}, timeout=idle or None)
        if not done:
            await self._socket.close(GOING_AWAY, f"no message for {idle:g} seconds")
            return None
        message = self._incoming.result()
        if message["type"] == "websocket.disconnect":
            return None
        self._incoming = asyncio.create_task(self._socket.receive())
        return message

    async def _answer(self, message: Mapping[str, Any]) -> None:
        start = time.perf_counter()
        try:
            answer = await self._unless_gone(self._served(message, start))
        except Cosmos3Error as error:
            await self._socket.send_text(json.dumps(envelope(error)))
        except WebSocketDisconnect:
            raise
        except Exception:
            logger.exception("an observation could not be served")
            problem = ApiError("internal_error", "the server failed; its log has the cause")
            await self._socket.send_text(json.dumps(envelope(problem)))
        else:
            await self._socket.send_bytes(msgpack.pack(answer))
        self._seconds = time.perf_counter() - start

    async def _unless_gone(self, work: Coroutine[Any, Any, Any]) -> Any:
        """What ``work`` comes to, unless the robot goes away meanwhile, which cancels it.

        Raises:
            WebSocketDisconnect: it did.
        """
        task = asyncio.create_task(work)
        await asyncio.wait({task, self._incoming}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done() and self._incoming.result()["type"] == "websocket.disconnect":
            task.cancel()
            await asyncio.wait({task})
            raise WebSocketDisconnect(self._incoming.result()["code"])
        return await task

    async def _served(self, message: Mapping[str, Any], start: float) -> Any:
        request = _unpacked(message)
        session = self._session_of(request)
        match request.get("endpoint", "infer"):
            case "reset":
                session.answers = 0
                return {"status": "reset successful"}
            case "infer":
                return await self._inferred(request, session, start)
            case other:
                raise InvalidRequest("endpoint", other, "infer or reset")

    async def _inferred(self, request: Mapping[str, Any], session: Session, start: float) -> Any:
        seed = request.get("seed")
        seed = session.seed if seed is None else seed
        space = self._service.options.robot_action_space
        observation = await asyncio.to_thread(droid.read, request, space)
        fields = droid.request_fields(observation, seed=seed, kind=self._service.model.kind)
        output = await self._service.inference.infer(fields)
        session.answers += 1
        assert output.action is not None
        actions = droid.actions(output.action, observation)
        if self._reply == ARRAY:
            return actions
        total = time.perf_counter() - start
        timing = {f"{name}_ms": 1000 * spent for name, spent in output.timings.items()}
        timing["infer_ms"] = 1000 * total
        if self._seconds is not None:
            timing["prev_total_ms"] = 1000 * self._seconds
        # openpi's clients read actions, those of the Cosmos Framework action.
        return {"actions": actions, "action": actions, "seed": seed, "server_timing": timing}

    def _session_of(self, request: Mapping[str, Any]) -> Session:
        name = request.get("session_id")
        if name is not None:
            if not isinstance(name, (str, int)) or len(str(name)) > 256:
                possible = "text of at most 256 characters, or a number"
                raise InvalidRequest("session_id", name, possible, "invalid_type")
            self._session = self._sessions.get(str(name))
        return self._session


async def _serve(socket: WebSocket, reply: str) -> None:
    """Let a robot in and serve it, or say why not."""
    state = socket.app.state
    if not state.cosmos3_keys.admit(socket.scope, BEARER, API_KEY):
        await socket.send_denial_response(refused("websocket"))
        return
    await socket.accept()
    service: Service | None = state.cosmos3
    code, reason = _obstacle(service, reply := socket.query_params.get("reply", reply))
    if reason:
        await socket.close(code, closing_reason(reason))
        return
    assert service is not None
    await Connection(socket, service, state.cosmos3_sessions, reply).run()


def closing_reason(text: str) -> str:
    """As much of a text as a closing frame has room for."""
    return text.encode()[:MAX_REASON].decode(errors="ignore")


def _obstacle(service: Service | None, reply: str) -> tuple[int, str]:
    """Why a robot cannot be served, with the code to close its connection with; or nothing."""
    if service is None:
        return TRY_AGAIN_LATER, "the generator is loading"
    if KINDS[service.model.kind].robot != droid.NAME:
        return (
            POLICY_VIOLATION,
            f"{service.names[0]} is no robot policy; serve {POLICY_CHECKPOINTS}",
        )
    if reply not in (ARRAY, DICT):
        return POLICY_VIOLATION, f"reply is {reply[:20]!r}, must be dict or array"
    return 0, ""


def _unpacked(message: Mapping[str, Any]) -> dict[str, Any]:
    data = message.get("bytes")
    if data is None:
        raise InvalidRequest("message", "text", "a msgpack map in a binary frame", "invalid_type")
    if len(data) > MAX_MESSAGE:
        sentence = f"the message has {len(data)} bytes, and may have {MAX_MESSAGE}"
        raise ApiError("payload_too_large", sentence, param="message")
    return msgpack.unpack(data)
