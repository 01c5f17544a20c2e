"""The stage process: takes requests from a socket and gives the ranks one call at a time.

Requests of one batch that are resident together make their steps in one call: they begin when all of
them are encoded, and end one by one. Whatever goes wrong in such a call, each is made again by itself.

One thread does everything. While the ranks compute, or are being replaced, it goes on reading the
socket, so a submission is answered at once and a cancelled request ends with its current step.
`client` starts this process; nothing of the parent is inherited and its main module not imported.
"""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import zmq

from vllm_cosmos3.checkpoint.load_progress import forget, slowest
from vllm_cosmos3.errors import (
    Busy,
    Cancelled,
    Cosmos3Error,
    DeadlineExceeded,
    InvalidRequest,
    OutOfMemory,
    WorkerDied,
    file_error,
)
from vllm_cosmos3.progress import Preview, Progress
from vllm_cosmos3.stage import heartbeat
from vllm_cosmos3.stage.batching import BATCH_WAIT_SECONDS
from vllm_cosmos3.stage.call_sequence import CallSequence
from vllm_cosmos3.stage.executor import StageExecutor
from vllm_cosmos3.stage.maintenance import ENDING, UNDO
from vllm_cosmos3.stage.messages import (
    Accepted,
    Cancel,
    Done,
    Failure,
    Maintain,
    PreviewUpdate,
    ProgressUpdate,
    Release,
    Setup,
    Status,
    StatusRequest,
    Stop,
    Submit,
    address,
)
from vllm_cosmos3.stage.parcels import packed
from vllm_cosmos3.stage.preview_pace import PreviewPace
from vllm_cosmos3.stage.scheduler import Scheduler
from vllm_cosmos3.stage.worker import end_with_parent, is_conflict, set_log_level

logger = logging.getLogger(__name__)

IDLE_SECONDS = 0.2  # between looks at the parent and the clock while there is nothing to do
ATTEMPTS = 2  # of a request whose ranks were lost through no fault of its own
CLIENT_SECONDS = 10.0  # for the client of a stage that fails at once to connect, and to hear why
ORPHAN_SECONDS = 15.0  # for an orderly end after the parent's death
PAUSES = {  # calls between requests, and whether requests may run after them
    "sleep": "sleeping",
    "wake_up": "",
    "start_weight_update": "updating",
    "keep_weight_update": "",
    "abort_weight_update": "",
}
# Calls that end an update: a rank that fails in one may have other weights, so all are replaced.
LAST = ("keep_weight_update", "abort_weight_update")
RESTARTS = 3  # tries to replace the ranks before giving up


@dataclass(slots=True, eq=False)
class JobState:
    """A request and how far it is."""

    client: bytes
    request: Submit
    expires: float | None
    calls: CallSequence
    pace: PreviewPace
    attempts: int = 0
    admitted: float = 0.0  # when
    cancelled: bool = False
    position: int = -1

    def start_again(self) -> None:
        self.calls = CallSequence(self.request.plan, self.request.clip)


@dataclass(frozen=True, slots=True)
class Maintenance:
    """A call of that kind, who waits for it, and when it is given up."""

    client: bytes
    call: Maintain
    expires: float


class Stopped(Exception):
    """Raised in the middle of a call when nobody waits for its end any more."""


class StageCore:
    """The state of the stage process. ``run`` returns when it was told to stop."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        forget(setup.folder)  # what the ranks of an earlier process have loaded
        heartbeat.forget(setup.folder)
        self._heartbeat = heartbeat.Heartbeat(setup.folder, "stage")
        self._executor = StageExecutor(setup.stage)
        self._scheduler = Scheduler(setup.queue)
        self._jobs: dict[str, JobState] = {}
        self._released: list[str] = []  # names that are to be given up
        self._maintenance: list[Maintenance] = []
        self._paused = ""  # why no request may run: sleeping, updating
        self._weights: str | None = None
        self._next_weights: str | None = None  # once they are kept
        self._updates = 0
        self._heard = 0.0  # when the last call of an update ended
        self._given_up = 0
        self._ended = ""  # how the last update has ended, where its trainer does not know yet
        self._clients: set[bytes] = set()
        self._state = "starting"
        self._restarts = 0
        self._calling, self._call_started = "", 0.0
        self._preview_seconds = 0.0  # that the last one took
        self._stop_at: float | None = None  # set once draining
        self._context = zmq.Context[zmq.Socket[bytes]]()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 2000)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.bind(address(setup.folder))

    def run(self) -> int:
        """Serve until stopped; the exit status."""
        try:
            self._while_serving(self._executor.start)
            if self._state == "starting":
                self._become("ready")
            while not self._finished():
                if not self._run_turn():
                    self._serve(IDLE_SECONDS)
        except Stopped:
            self._end_all(Cancelled("the server was stopped"))
        except Cosmos3Error as error:
            logger.error("the stage ends: %s", error)
            self._wait_for_client()
            self._become("failed")
            self._end_all(WorkerDied(f"the stage ended: {error}"))
            self._send_all(Failure(None, error))
            return 1
        finally:
            self._executor.close()
            self._socket.close()
            self._context.term()  # when the last messages are on their way
        return 0

    def _wait_for_client(self) -> None:
        """Serve until somebody has connected, or nobody will."""
        end = time.monotonic() + CLIENT_SECONDS
        while not self._clients and self._stop_at != 0.0 and time.monotonic() < end:
            self._serve(IDLE_SECONDS)

    def drain(self, *_: object) -> None:
        """Take nothing new, and stop when all that was accepted is served. A signal handler."""
        if self._stop_at is None:
            self._stop_at = time.monotonic() + self._setup.drain_seconds
            self._state = "draining"

    # Turns.

    def _run_turn(self) -> bool:
        """Make one call for one request; False if there is nothing to do."""
        self._end_expired()
        # While there was nothing to do. Those asleep are replaced once they are woken: others have their devices.
        if self._executor.lost and self._paused != "sleeping":
            logger.error("a worker process has ended")
            self._executor.healthy = False
            self._replace_ranks()
        self._release()
        self._end_silent_update()
        if self._maintenance and not self._scheduler.resident:
            self._maintain(self._maintenance.pop(0))
            return True
        if not (self._maintenance or self._paused):
            self._admit()
        self._send_positions()
        name = self._scheduler.turn()
        if name is None:
            return False
        jobs, seconds = self._next_batch(name)
        if seconds > 0:
            self._serve(seconds)
            return True
        start = time.monotonic()
        try:
            self._advance(*jobs)
        except Cosmos3Error as error:
            if len(jobs) == 1:
                self._handle_failure(jobs[0], error)
            else:
                self._separate(jobs, error)
        else:
            for job in jobs:
                if job.request.job in self._jobs:
                    self._scheduler.charge(job.request.job, time.monotonic() - start)
        return True

    def _admit(self) -> None:
        while (name := self._scheduler.admit()) is not None:
            self._jobs[name].admitted = time.monotonic()

    def _next_batch(self, name: str) -> tuple[list[JobState], float]:
        """The requests of a batch that make their next step together, or one of them that is not encoded yet.

        With the seconds for which they may still wait for others.
        """
        job = self._jobs[name]
        mates = [self._jobs[mate] for mate in self._scheduler.mates(name)]
        behind = [mate for mate in mates if mate.calls.phase == "encode"]
        if behind or job.calls.phase != "denoise":
            return (behind or [job])[:1], 0.0
        wait = 0.0
        if self._scheduler.has_room(name) and not self._maintenance:
            wait = min(mate.admitted for mate in mates) + BATCH_WAIT_SECONDS - time.monotonic()
        return mates, wait

    def _maintain(self, one: Maintenance) -> None:
        """Make a call between requests, and tell who waits for it."""
        name, method = one.call.job, one.call.method
        try:
            self._check_in_time(method)
            value = self._call(method, *one.call.args)[0]
        except Cosmos3Error as error:
            logger.error("%s failed: %s", method, error)
            if not is_conflict(error):
                self._undo(method)
            if self._executor.healthy:
                self._send(one.client, Failure(name, error))
                return
            reason = f"{error}; new ranks load the weights of the checkpoint"
            self._send(one.client, Failure(name, WorkerDied(reason)))
            self._replace_ranks()
            return
        self._paused = PAUSES.get(method, self._paused)
        self._heard = time.monotonic()
        if method == "start_weight_update":
            self._ended = ""
        if method == "finish_weight_update":
            (self._next_weights,) = one.call.args
        if method == "keep_weight_update":
            self._weights, self._updates = self._next_weights, self._updates + 1
        self._send_all(self._status())
        self._send(one.client, Done(name, value))

    def _undo(self, method: str) -> None:
        """What has failed on one rank is undone on all of them, or they are replaced."""
        if method in LAST:
            self._executor.healthy = False
        elif method in UNDO and self._executor.healthy:
            self._call_off(UNDO[method])

    def _end_silent_update(self) -> None:
        """Give an update up whose trainer has gone away."""
        limit = self._setup.stage.update_timeout
        over = time.monotonic() - self._heard > limit
        if self._paused == "updating" and over and not self._maintenance:
            logger.warning(
                "the weight update is given up: no call of the trainer for %g s; the old weights are back",
                limit,
            )
            self._given_up += 1
            self._ended = f"given up, with the old weights, after {limit:g} s without a call"
            self._call_off("abort_weight_update")
            if not self._executor.healthy:
                self._replace_ranks()

    def _check_in_time(self, method: str) -> None:
        """Tell a trainer that comes back too late what has become of its update."""
        if method in ENDING and self._ended:
            possible = f"called after start_weight_update again: the update was {self._ended}"
            raise InvalidRequest(method, "called", possible, "conflict")

    def _call_off(self, undo: str) -> None:
        """What goes wrong between requests is undone on all ranks: they have the weights of before."""
        try:
            self._call(undo)
        except Cosmos3Error as error:
            logger.error("the workers were lost: %s", error)
            self._executor.healthy = False
            return  # until they are replaced, nothing runs
        self._paused = ""
        self._send_all(self._status())

    def _advance(self, job: JobState, *others: JobState) -> None:
        """The next call of this request, or of several, and what their owners are told of it."""
        name = job.request.job
        if job.calls.phase == "denoise" and job.calls.step == 0:
            self._scheduler.begin(name)
        if others:
            self._step_together([job, *others])
            return

        def call(method: str, *args: Any) -> Any:
            if method == "decode" and self._executor.away:
                args = ()  # the clip is a file of this host
            return self._call(method, name, *args)[0]

        job.attempts += job.calls.phase == "encode"
        phase, start = job.calls.phase, time.monotonic()
        if job.calls.advance(call, partial(self._report, job)):
            self._finish(job)
        elif phase == job.calls.phase == "denoise":
            job.pace.stepped(time.monotonic() - start)
            if job.request.preview and job.pace.due(self._preview_seconds):
                self._preview(job)

    def _step_together(self, jobs: list[JobState]) -> None:
        reused = self._call("step", *(job.request.job for job in jobs))[0]
        for job, count in zip(jobs, reused, strict=True):
            job.calls.advance(lambda _, count=count: count, partial(self._report, job))

    def _report(self, job: JobState, progress: Progress) -> None:
        self._send(job.client, ProgressUpdate(job.request.job, progress))

    def _preview(self, job: JobState) -> None:
        """A call like the others, which all ranks make at the same place."""
        name = job.request.job
        (made, *_) = self._call("preview", name)
        if made is None:  # there is nothing to see
            job.pace.previewed(0.0)
        else:
            self._preview_seconds, jpeg = made
            job.pace.previewed(self._preview_seconds)
            self._send(job.client, PreviewUpdate(name, Preview(step=job.calls.step, jpeg=jpeg)))

    def _finish(self, job: JobState) -> None:
        name, request = job.request.job, job.request
        spool = None if request.save is not None else self._spool(job)
        if self._executor.away:
            value = self._fetch(name, request.save, spool)
        else:
            (value, *_) = self._call("finish", name, request.save, spool)
        self._send(job.client, Done(name, spool if spool is not None else value))
        self._forget(job)

    def _fetch(self, name: str, save: Path | None, spool: Path | None) -> list[Path] | None:
        """The end of a request whose files have to come from another host."""
        try:
            before = {} if save is None else packed(save)
            (sent, *_) = self._call("send", name, save, before)
            if save is not None:
                files: list[Path] = sent.deliver(save)
                return files
            assert spool is not None
            spool.write_bytes(sent)
        except OSError as error:
            raise file_error(error) from error
        return None

    def _call(self, method: str, *args: Any) -> list[Any]:
        self._calling, self._call_started = method, time.monotonic()
        try:
            return self._executor.call(method, *args, while_waiting=self._serve_or_stop)
        finally:
            self._calling = ""

    def _handle_failure(self, job: JobState, error: Cosmos3Error) -> None:
        """Fail ``job``; bring the ranks back if they went with it, and start the others again."""
        if isinstance(error, OutOfMemory) and error.crowded and not self._is_alone(job):
            self._scheduler.readmit(job.request.job, alone=True)
            job.attempts -= 1
            return  # nothing was made of it
        logger.error("request %s failed in %s: %s", job.request.job, job.calls.phase, error)
        self._fail(job, error)
        if self._executor.healthy:
            self._drop(job)
        else:
            self._replace_ranks()

    def _separate(self, jobs: list[JobState], error: Cosmos3Error) -> None:
        """Nobody knows whose failure it was: each is made again by itself, and fails by itself."""
        logger.error("%d requests failed in a step together: %s", len(jobs), error)
        for job in reversed(jobs):
            job.start_again()
            self._scheduler.readmit(job.request.job, alone=True)
        if not self._executor.healthy:
            self._replace_ranks()
            return
        for job in jobs:
            self._drop(job)

    def _is_alone(self, job: JobState) -> bool:
        return any(e.name == job.request.job and e.alone for e in self._scheduler.resident)

    def _drop(self, job: JobState) -> None:
        try:
            self._call("drop", job.request.job)
        except Cosmos3Error as error:
            logger.error("the workers were lost: %s", error)
            self._replace_ranks()

    def _release(self) -> None:
        while self._released:
            try:
                self._call("release", self._released.pop(0))
            except Cosmos3Error as error:
                logger.error("the workers were lost: %s", error)
                self._replace_ranks()

    def _replace_ranks(self) -> None:
        """New workers. Requests that were on the old ones start again, but not for ever."""
        for entry in reversed(list(self._scheduler.resident)):
            other = self._jobs[entry.name]
            if other.attempts < ATTEMPTS:
                other.start_again()
                self._scheduler.readmit(entry.name)
            else:
                self._fail(other, WorkerDied("the workers were lost again; please retry"))
        if self._state == "ready":
            self._become("recovering")
        for attempt in range(1, RESTARTS + 1):
            heartbeat.forget(self._setup.folder)
            try:
                self._while_serving(self._executor.restart)
                break
            except Cosmos3Error as error:
                logger.error("restart %d of %d failed: %s", attempt, RESTARTS, error)
                if attempt == RESTARTS:
                    raise
        self._restarts += 1
        if self._paused == "updating":
            self._ended = "lost with a rank, and all have the weights of the checkpoint"
        # They have just loaded the checkpoint.
        self._paused, self._weights, self._updates = "", None, 0
        if self._state == "recovering":
            self._become("ready")

    def _end_expired(self) -> None:
        """End what was cancelled or has run out of time, between two calls."""
        for job in list(self._jobs.values()):
            error = self._end_of(job)
            if error is None or job.request.job not in self._jobs:
                continue  # it goes on, or went with one before it
            resident = self._is_resident(job)
            self._fail(job, error)
            if resident:
                self._drop(job)
        self._end_impatient()

    def _end_impatient(self) -> None:
        """Give up calls between requests that have waited for the running ones too long."""
        now, count = time.monotonic(), len(self._scheduler.resident)
        if count == 0:  # they have ended
            return
        for one in [one for one in self._maintenance if now > one.expires]:
            self._maintenance.remove(one)
            running = "1 request is" if count == 1 else f"{count} requests are"
            reason = f"{running} still running after {one.call.patience:g} s"
            self._send(one.client, Failure(one.call.job, Busy(reason)))

    def _end_waiting(self) -> None:
        """End what was cancelled or has run out of time before it began, also during a call."""
        for job in list(self._jobs.values()):
            error = self._end_of(job)
            if error is not None and not self._is_resident(job):
                self._fail(job, error)

    def _end_of(self, job: JobState) -> Cosmos3Error | None:
        """Why a request is to end now."""
        now = time.monotonic()
        if job.cancelled:
            return Cancelled("the request was cancelled")
        if job.expires is not None and now > job.expires:
            return DeadlineExceeded("the request has run out of its time")
        if self._stop_at is not None and (self._paused or now > self._stop_at):
            return Cancelled("the server was stopped")
        return None

    def _is_resident(self, job: JobState) -> bool:
        return any(entry.name == job.request.job for entry in self._scheduler.resident)

    def _end_all(self, error: Cosmos3Error) -> None:
        for job in list(self._jobs.values()):
            self._fail(job, error)
        for one in self._maintenance:
            self._send(one.client, Failure(one.call.job, error))
        self._maintenance.clear()

    def _spool(self, job: JobState) -> Path:
        """File in which rank 0 leaves the result of a request."""
        return self._setup.folder / job.request.job

    def _fail(self, job: JobState, error: Cosmos3Error) -> None:
        self._spool(job).unlink(missing_ok=True)  # of a rank that died while it wrote
        self._send(job.client, Failure(job.request.job, error))
        self._forget(job)

    def _forget(self, job: JobState) -> None:
        self._scheduler.remove(job.request.job)
        del self._jobs[job.request.job]

    # Messages.

    def _serve(self, seconds: float = 0.0) -> None:
        """Answer all messages that are there, after at most ``seconds`` of waiting for one."""
        self._give_sign_of_life()
        if os.getppid() != self._setup.parent:
            self._stop_at = 0.0  # nobody is left to serve
        self._socket.poll(int(seconds * 1000))
        while self._socket.poll(0):
            client, data = self._socket.recv_multipart()
            self._clients.add(client)
            self._answer(client, pickle.loads(data))
        self._end_waiting()

    def _give_sign_of_life(self) -> None:
        if self._setup.stage.backend != "uni":  # whose rank is in this process and has its own
            with suppress(OSError):  # a full disk, or the folder went with the parent
                self._heartbeat.beat()

    def _serve_or_stop(self) -> None:
        self._serve()
        if self._stop_at == 0.0:
            raise Stopped

    def _answer(self, client: bytes, message: object) -> None:
        match message:
            case Submit():
                self._submit(client, message)
            case Maintain():
                expires = time.monotonic() + message.patience
                self._maintenance.append(Maintenance(client, message, expires))
            case Cancel(job=name):
                if name in self._jobs:
                    self._jobs[name].cancelled = True
            case Release(name=name):
                self._released.append(name)
            case Stop():
                self._state, self._stop_at = "draining", 0.0
            case StatusRequest():
                self._send(client, self._status())

    def _submit(self, client: bytes, request: Submit) -> None:
        try:
            if self._stop_at is not None:
                raise Busy("the server is stopping")
            self._scheduler.submit(request.job, request.seconds, request.batch)
        except Busy as error:
            self._send(client, Failure(request.job, error))
            return
        expires = None if request.deadline is None else time.monotonic() + request.deadline
        calls = CallSequence(request.plan, request.clip)
        pace = PreviewPace(request.plan.steps)
        job = self._jobs[request.job] = JobState(client, request, expires, calls, pace)
        job.position = self._scheduler.position(request.job)
        self._send(client, Accepted(request.job, job.position))

    def _send_positions(self) -> None:
        for index, entry in enumerate(self._scheduler.waiting):
            job = self._jobs[entry.name]
            if job.position != index:
                job.position = index
                self._send(job.client, Accepted(entry.name, index))

    def _become(self, state: str) -> None:
        self._state = state
        self._send_all(self._status())

    def _status(self) -> Status:
        return Status(
            state=self._paused if self._paused and self._state == "ready" else self._state,
            waiting=len(self._scheduler.waiting),
            waiting_seconds=self._scheduler.waiting_seconds,
            running=len(self._scheduler.resident),
            limit=self._setup.queue.max_waiting,
            restarts=self._restarts,
            weights=self._weights,
            updates=self._updates,
            given_up=self._given_up,
            nodes=self._executor.nodes,
            loaded=slowest(self._setup.folder),
            call=self._calling,
            call_seconds=time.monotonic() - self._call_started if self._calling else 0.0,
        )

    def _send_all(self, message: object) -> None:
        for client in self._clients:
            self._send(client, message)

    def _send(self, client: bytes, message: object) -> None:
        self._socket.send_multipart([client, pickle.dumps(message)])

    # Life.

    def _finished(self) -> bool:
        return self._stop_at is not None and not self._jobs and not self._maintenance

    def _while_serving(self, work: Callable[[], None]) -> None:
        """Do ``work`` in another thread and answer messages meanwhile; raises what it raised."""
        raised: list[BaseException] = []

        def run() -> None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - raised again below
                raised.append(error)

        thread = threading.Thread(target=run, name="executor-start")
        thread.start()
        while thread.is_alive():
            self._serve(0.05)
        if raised:
            raise raised[0]


def main() -> int:
    """Run a stage for the `Setup` on standard input."""
    setup: Setup = pickle.load(sys.stdin.buffer)
    set_log_level()
    gone = partial(shutil.rmtree, setup.folder, ignore_errors=True)
    end_with_parent(setup.parent, patience=ORPHAN_SECONDS, last=gone)
    core = StageCore(setup)
    signal.signal(signal.SIGTERM, core.drain)
    try:
        return core.run()
    finally:
        if os.getppid() != setup.parent:
            gone()
