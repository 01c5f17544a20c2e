"""The WebSocket of simulators: actions in, frames out, as they are made. The messages are SGLang's.

The client begins with an ``init``, and sends actions as ``event``, a row or several. The server makes one
chunk after the other of the rows that have come, and of idle ones where there are too few, until
``max_chunks`` are made. Each gives messages ``frame_batch`` and then ``chunk_stats``. Messages are
msgpack maps. What cannot be served is an ``error``, after which wrong actions are forgotten.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import logging
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import numpy as np
from fastapi import APIRouter, WebSocket, WebSocketDisconnect
from PIL import Image

from vllm_cosmos3.errors import Busy, Cosmos3Error, InvalidRequest
from vllm_cosmos3.generator.output import Output
from vllm_cosmos3.request.world import SessionRequest, World, find_space
from vllm_cosmos3.server.http import keys
from vllm_cosmos3.server.http.api_errors import SERVER_FAILED, ApiError, slug
from vllm_cosmos3.server.jobs.service import Service
from vllm_cosmos3.server.jobs.worlds import Worlds
from vllm_cosmos3.server.routes.robots import (
    GOING_AWAY,
    MAX_MESSAGE,
    POLICY_VIOLATION,
    TRY_AGAIN_LATER,
    closing_reason,
)
from vllm_cosmos3.server.routes.route import Route

logger = logging.getLogger(__name__)
router = APIRouter(route_class=Route, tags=["Cosmos3 simulators"])

PATH = "/v1/realtime_video/generate"
RAW = "application/x-raw-rgb"
DONE, FAILED = 1000, 1011  # codes of a WebSocket's end
Message = TypeVar("Message", bound=msgspec.Struct)
MAX_ROWS = 4096  # that wait
# Bytes of a message beside its picture, which become objects while everybody else waits.
MAX_PLAIN = 4 * 2**20
CONTAINERS = (*range(0x80, 0xA0), *range(0xDC, 0xE0))  # first bytes of msgpack's maps and lists
# Our fields in the words of the first message.
THEIRS = {
    "image": "first_frame",
    "view_point": "action_view_point",
    "history": "realtime_causal_kv_cache_num_frames",
    "sinks": "realtime_causal_sink_size",
}
STILL = (0, 0, 0, 1, 0, 0, 0, 1, 0)  # a pose that does not move: no translation, no rotation


class Inputs(msgspec.Struct):
    """What the actions are of, and those that wait from the beginning: an embodiment, or a list by row."""

    domain_name: str | list[str] | None = None
    domain_id: int | list[int] | None = None
    action_rows: list[list[float]] = []


class Init(msgspec.Struct):
    """The first message."""

    type: Literal["init"]
    prompt: str = ""
    size: str | None = None
    fps: float = 24.0
    seed: int = 42
    first_frame: msgspec.Raw = msgspec.Raw(b"\xc0")  # bytes or a text
    condition_inputs: Inputs = msgspec.field(default_factory=Inputs)
    max_chunks: Annotated[int, msgspec.Meta(ge=0)] | None = None
    realtime_output_format: Literal["raw", "webp", "jpeg"] = "raw"
    realtime_preview_max_width: Annotated[int, msgspec.Meta(ge=0)] | None = None
    realtime_causal_sink_size: int | None = None
    realtime_causal_kv_cache_num_frames: int | None = None
    action_view_point: str = "ego_view"


class Picture(msgspec.Struct):
    """Of any message, what may be large."""

    first_frame: msgspec.Raw = msgspec.Raw()


_PICTURE = msgspec.msgpack.Decoder(Picture)


class Event(msgspec.Struct):
    """A later message: one row of actions, or several, of the session's embodiment unless it says another."""

    type: Literal["event"]
    kind: Literal["action"]
    payload: Any
    domain_name: str | list[str] | None = None
    domain_id: int | list[int] | None = None
    event_id: int | str | None = None


@router.websocket(PATH)
async def generate(socket: WebSocket) -> None:
    """Let a client in and serve its session, or say why not."""
    state = socket.app.state
    if not state.cosmos3_keys.admit(socket.scope, keys.BEARER, keys.API_KEY):
        await socket.send_denial_response(keys.refused("websocket"))
        return
    await socket.accept()
    service: Service | None = state.cosmos3
    code, reason = _obstacle(service)
    if service is None or service.worlds is None or reason:
        await socket.close(code, closing_reason(reason))
        return
    idle = service.options.session_idle_timeout
    await Connection(socket, service.worlds, idle).run()


def _obstacle(service: Service | None) -> tuple[int, str]:
    """Why no session can be served, with the code to close the connection with; or nothing."""
    if service is None:
        return TRY_AGAIN_LATER, "the generator is loading"
    if service.worlds is None:
        return POLICY_VIOLATION, f"{service.names[0]} is no simulator"
    return 0, ""


class Connection:
    """One client and its session. Losing the client stops what is being made and frees the session."""

    def __init__(self, socket: WebSocket, worlds: Worlds, idle: float) -> None:
        self._socket, self._worlds, self._idle = socket, worlds, idle
        self._rows: deque[tuple[str, np.ndarray]] = deque()  # with their embodiments
        self._event: int | str | None = None
        self._last_message = time.monotonic()

    async def run(self) -> None:
        """Serve until either side goes away."""
        try:
            init = await self._init()
            request = session_fields(init)
            async with self._worlds.session(request) as world:
                given = init.condition_inputs
                self._take(given.action_rows, _domains(given, world), world)
                await self._serve(init, world)
        except WebSocketDisconnect:
            logger.debug("a client went away")
        except TimeoutError:  # before the first message
            await self._socket.close(GOING_AWAY, f"no message for {self._idle:g} seconds")
        except Busy as error:
            await self._end(POLICY_VIOLATION, error)
        except InvalidRequest as error:
            name = THEIRS.get(error.field, error.field)
            named = InvalidRequest(name, error.value, error.possible, error.code)
            await self._end(POLICY_VIOLATION, named)
        except Cosmos3Error as error:
            blocked = slug(error) == "guardrail_blocked"
            await self._end(POLICY_VIOLATION if blocked else FAILED, error)
        except Exception:
            logger.exception("a session failed")
            await self._end(FAILED, ApiError("internal_error", SERVER_FAILED))

    async def _init(self) -> Init:
        data = await asyncio.wait_for(self._socket.receive(), self._idle or None)
        if data["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(data["code"])
        return _decoded(data.get("bytes"), Init)

    async def _serve(self, init: Init, world: World) -> None:
        """Make chunks while another task receives the client's messages, and end when it goes away."""
        tasks = {
            asyncio.create_task(self._make(init, world)),
            asyncio.create_task(self._receive(world)),
        }
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()

    async def _make(self, init: Init, world: World) -> None:
        first = await self._worlds.run(world, world.open())
        await self._send(init, first, chunk=0, batch=0, last=False)
        chunk = 0
        while init.max_chunks is None or chunk < init.max_chunks:
            if self._idle and time.monotonic() - self._last_message > self._idle:
                reason = f"no message for {self._idle:g} seconds"
                await self._socket.close(GOING_AWAY, reason)
                return
            start = time.perf_counter()
            output = await self._worlds.run(world, world.step(*self._next_rows(world)))
            await self._send(init, output, chunk=chunk, batch=1 if chunk == 0 else 0, last=True)
            spent = {f"{name}_ms": 1000 * seconds for name, seconds in output.timings.items()}
            spent["total_ms"] = 1000 * (time.perf_counter() - start)
            await self._tell(type="chunk_stats", chunk_index=chunk, **spent)
            chunk += 1
        await self._socket.close(DONE, f"max_chunks={init.max_chunks} are made")

    async def _receive(self, world: World) -> None:
        while True:
            data = await self._socket.receive()
            if data["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(data["code"])
            self._last_message = time.monotonic()
            try:
                event = _decoded(data.get("bytes"), Event)
                self._take(event.payload, _domains(event, world), world)
                self._event = event.event_id
            except InvalidRequest as error:
                await self._tell(type="error", content=str(error), code=slug(error))

    def _take(self, payload: Any, names: list[str], world: World) -> None:
        """Rows of these embodiments that wait for the next chunks."""
        spaces = [world.causal.spaces[name] for name in names]
        widths = sorted({world.space.width, *(space.slots for space in spaces[:1])})
        possible = f"rows of {' or '.join(map(str, widths))} finite numbers"
        try:
            with np.errstate(over="ignore"):
                rows = np.atleast_2d(np.asarray(payload, np.float32))
        except (TypeError, ValueError, OverflowError):
            raise InvalidRequest("payload", payload, possible, "invalid_type") from None
        if not rows.size:
            return
        if rows.ndim != 2 or rows.shape[1] not in widths or not np.isfinite(rows).all():
            raise InvalidRequest("payload", list(rows.shape), possible)
        if len(self._rows) + len(rows) > MAX_ROWS:
            raise InvalidRequest("payload", f"{len(rows)} rows", f"sent later: {MAX_ROWS} may wait")
        if len(names) not in (1, len(rows)):
            possible = f"an embodiment, or one for each of {len(rows)} rows"
            raise InvalidRequest("domain_name", names, possible)
        spaces *= len(rows) // len(spaces)
        if any(row[space.slots :].any() for row, space in zip(rows, spaces, strict=True)):
            possible = "0 beyond the numbers that the embodiment of a row has"
            raise InvalidRequest("payload", "other numbers", possible)
        rows = np.pad(rows, ((0, 0), (0, world.space.width - rows.shape[1])))
        self._rows.extend(zip((space.name for space in spaces), rows, strict=True))

    def _next_rows(self, world: World) -> tuple[np.ndarray, list[str]]:
        """Those of the next chunk, of which the last ones are idle where too few have come."""
        count, width = world.shape
        still = np.zeros(width, np.float32)
        if world.space.offset is not None and width == len(STILL):
            still[:] = STILL
        idle = world.space.name, still
        taken = [self._rows.popleft() if self._rows else idle for _ in range(count)]
        names, rows = zip(*taken, strict=True)
        return np.stack(rows), list(names)

    async def _send(
        self, init: Init, output: Output, *, chunk: int, batch: int, last: bool
    ) -> None:
        assert output.video is not None
        parts = await asyncio.to_thread(lambda frames: [*batches(frames, init)], output.video)
        for place, (count, fields, payload) in enumerate(parts):
            await self._tell(
                type="frame_batch",
                chunk_index=chunk,
                frame_batch_index=batch + place,
                event_id=self._event,
                num_frames=count,
                is_final_frame_batch=last and place == len(parts) - 1,
                **fields,
                payload=payload,
            )

    async def _tell(self, **message: Any) -> None:
        await self._socket.send_bytes(msgspec.msgpack.encode(message))

    async def _end(self, code: int, error: Cosmos3Error) -> None:
        with suppress(WebSocketDisconnect, RuntimeError):  # it may have gone meanwhile
            await self._tell(type="error", content=str(error), code=slug(error))
            await self._socket.close(code, closing_reason(str(error)))


def session_fields(init: Init) -> SessionRequest:
    """What a session begins with, in our words.

    Raises:
        InvalidRequest: a field has a value that it cannot have.
    """
    name = init.condition_inputs.domain_name
    sinks, kept = init.realtime_causal_sink_size, init.realtime_causal_kv_cache_num_frames
    fields: dict[str, Any] = {
        "prompt": init.prompt,
        "image": _picture(init.first_frame),
        "size": init.size,
        "fps": init.fps,
        "seed": init.seed,
        "domain_name": name if isinstance(name, str) else None,
        "view_point": init.action_view_point,
        "sinks": sinks,
    }
    if kept is not None:  # theirs counts the sinks, too
        if kept <= (least := max(0, sinks or 0)):
            raise InvalidRequest(THEIRS["history"], kept, f"above {least}, the sinks")
        fields["history"] = kept - (sinks or 0)
    return SessionRequest(**fields)


def _domains(given: Inputs | Event, world: World) -> list[str]:
    """The embodiments of rows by name: one for all of them, or one for each.

    Raises:
        InvalidRequest: the checkpoint has none of that name or number.
    """
    name, number = given.domain_name, given.domain_id
    if name is not None:
        names = [name] if isinstance(name, str) else name
        return [find_space(world.causal, each).name for each in names]
    if number is None:
        return [world.space.name]
    # Of those that share a number the first one stands for all: the model sees the number.
    known = {space.domain_id: space.name for space in reversed([*world.causal.spaces.values()])}
    numbers = [number] if isinstance(number, int) else number
    if unknown := [each for each in numbers if each not in known]:
        possible = f"one of {', '.join(map(str, sorted(known)))}"
        raise InvalidRequest("domain_id", unknown[0], possible)
    return [known[each] for each in numbers]


def batches(frames: np.ndarray, init: Init) -> Iterator[tuple[int, dict[str, Any], bytes]]:
    """Messages of frames uint8 [T, H, W, 3]: all raw ones at once, or a picture for each."""
    count, height, width, _ = frames.shape
    if init.realtime_output_format == "raw":
        shape = {
            "width": width,
            "height": height,
            "channels": 3,
            "bytes_per_frame": 3 * width * height,
        }
        yield count, {"content_type": RAW, **shape}, frames.tobytes()
        return
    limit = init.realtime_preview_max_width or width
    for frame in frames:
        picture = Image.fromarray(frame)
        picture.thumbnail((limit, height))
        data = io.BytesIO()
        picture.save(data, init.realtime_output_format)
        fields = {
            "content_type": f"image/{init.realtime_output_format}",
            "width": picture.width,
            "height": picture.height,
        }
        yield 1, fields, data.getvalue()


def _picture(given: msgspec.Raw) -> bytes | None:
    """The bytes of a picture; a text is base64, or a data URL. No file is opened and no URL fetched."""
    value: Any = "unreadable"
    try:
        if memoryview(given)[0] not in CONTAINERS:  # whose objects would be many times the message
            value = msgspec.msgpack.decode(given)
        if value is None or isinstance(value, bytes):
            return value
        return base64.b64decode(value.rpartition(",")[2], validate=True)
    except (AttributeError, ValueError, binascii.Error, msgspec.DecodeError):
        possible = "bytes, or base64 of a picture"
        raise InvalidRequest("first_frame", value, possible, "invalid_type") from None


def _decoded(data: bytes | None, kind: type[Message]) -> Message:
    if data is None or len(data) > MAX_MESSAGE:
        possible = f"a msgpack map of at most {MAX_MESSAGE} bytes in a binary frame"
        raise InvalidRequest("message", "text" if data is None else len(data), possible)
    try:
        beside = len(data) - len(memoryview(_PICTURE.decode(data).first_frame))
        if beside > MAX_PLAIN:
            possible = f"of at most {MAX_PLAIN} bytes beside first_frame"
            raise InvalidRequest("message", f"{beside} bytes", possible)
        return msgspec.msgpack.decode(data, type=kind, strict=False)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest("message", "malformed", f"{kind.__name__.lower()}: {error}") from None
