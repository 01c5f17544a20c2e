"""The client of the stage: starts its process, submits requests to it and follows them.

Safe to use from several threads. If the process ends, what it was serving fails with WorkerDied and
a new one is started, until ``close``.
"""

from __future__ import annotations

import atexit
import logging
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import TimeoutError as StillWaiting
from dataclasses import replace
from getpass import getuser
from pathlib import Path
from typing import Any

import zmq

from vllm_cosmos3.errors import Cosmos3Error, DeadlineExceeded, WorkerDied
from vllm_cosmos3.stage.config import StageConfig
from vllm_cosmos3.stage.heartbeat import silence
from vllm_cosmos3.stage.job import StageJob, Stages
from vllm_cosmos3.stage.launcher import DEVICES, check_backend
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
from vllm_cosmos3.stage.scheduler import QueueConfig

BOOTSTRAP = (  # the modules are frozen, as ranks that are forked would copy what the collector visits
    "import gc, pickle, sys; gc.disable(); sys.path[:] = pickle.load(sys.stdin.buffer); "
    "from vllm_cosmos3.stage.process import main; gc.freeze(); gc.enable(); sys.exit(main())"
)
STDERR = 2
QUIET = {  # what torch and vLLM would say of an ordinary start
    "TORCH_LOGS": "-all",
    "PYTHONWARNINGS": "ignore::FutureWarning:vllm.triton_utils.dispatcher",
}
STOP_SECONDS = 20.0  # until a stage that was told to stop is killed
ACCEPT_SECONDS = 30.0  # until a request that is not answered is given up
# Without a message of a stage that has ended by itself, or was killed: until no more are waited for.
ENDED_SECONDS, KILLED_SECONDS = 5.0, 0.2
UP = ("ready", "sleeping", "updating")
SILENT_SECONDS = 10.0  # without a sign of life, after which nothing is expected of the stage


class StageClient(Stages):
    """A stage in a process of its own. Returns at once; ``wait_ready`` waits for the weights.

    ``devices`` are those that it sees, in the words of CUDA_VISIBLE_DEVICES; None: all.

    Raises:
        InvalidRequest: the backend cannot run here.
    """

    def __init__(
        self,
        stage: StageConfig,
        queue: QueueConfig | None = None,
        *,
        drain_seconds: float = 600.0,
        devices: str | None = None,
    ) -> None:
        check_backend(stage)
        self.devices, self.process_restarts = devices, 0
        self._stage, self._queue = stage, queue or QueueConfig()
        self._drain_seconds = drain_seconds
        self._folder = Path(tempfile.mkdtemp(prefix="cosmos3-"))
        self._jobs: dict[str, StageJob] = {}
        self._status = Status(state="starting")
        self._changed = threading.Condition()  # guards all state, tells of every change
        self._error: Cosmos3Error | None = None
        self._closing = False
        self._answered = 0
        self._process = self._start_process()
        context: zmq.Context[Any] = zmq.Context.instance()
        self._wake: zmq.Socket[bytes] = context.socket(zmq.PUSH)
        self._wake.bind(f"inproc://{self._folder.name}")
        self._outgoing: zmq.Socket[bytes] = context.socket(zmq.PULL)
        self._outgoing.connect(f"inproc://{self._folder.name}")
        self._thread = threading.Thread(target=self._listen, name="stage-client", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def wait_ready(self, timeout: float | None = None) -> None:
        with self._changed:
            if not self._changed.wait_for(
                lambda: self._error is not None or self._status.state in UP, timeout
            ):
                raise TimeoutError(f"the stage is {self._status.state}")
            if self._error is not None:
                raise self._error

    @property
    def error(self) -> Cosmos3Error | None:
        return self._error

    def hand_over(self, job: StageJob, request: Submit) -> None:
        """Give the stage a request, which it accepts or refuses later.

        Raises:
            Cosmos3Error: the stage is gone, or gives no sign of life.
        """
        with self._changed:
            self._check_open()
            self._jobs[job.name] = job
            self._send(request, job.name)

    def _take(self, job: StageJob, request: Submit) -> None:
        self.hand_over(job, request)
        try:
            job.accepted.result(ACCEPT_SECONDS)
        except StillWaiting:
            self._give_up(job, WorkerDied(f"the stage did not answer for {ACCEPT_SECONDS:.0f} s"))
            job.result()

    @property
    def members(self) -> tuple[Stages, ...]:
        return (self,)

    @property
    def can_serve(self) -> bool:
        up = self._error is None and not self._closing and self._status.state == "ready"
        return up and not self.silent

    def release(self, name: str) -> None:
        with self._changed:
            if not self._closing:
                self._send(Release(name))

    @property
    def updates(self) -> int:
        return self._status.updates

    def _maintain(self, method: str, *args: Any, patience: float) -> Any:
        job = StageJob(uuid.uuid4().hex, _keep, None, None)
        with self._changed:
            self._check_open()
            self._jobs[job.name] = job
            call = Maintain(job=job.name, method=method, args=args, patience=patience)
            self._send(call, job.name)
        return job.result()

    def last_sign_of_life(self) -> float:
        """Seconds since the stage's process, or that of its ranks which is silent longest, gave one."""
        return silence(self._folder)

    @property
    def silent(self) -> bool:
        """Whether a stage that was ready has given no sign of life for too long."""
        return self._status.state in UP and self.last_sign_of_life() > SILENT_SECONDS

    def status(self, timeout: float = 10.0) -> Status:
        """While the stage's process does not answer, the last that it sent."""
        with self._changed:
            if self._error is None and not self._closing and not self.silent:
                answered = self._answered
                self._send(StatusRequest())
                self._changed.wait_for(lambda: self._answered > answered, timeout)
            return self._status

    def cancel(self, name: str) -> None:
        with self._changed:
            if name in self._jobs and not self._closing:
                self._send(Cancel(name), name)

    def close(self) -> None:
        with self._changed:
            if self._closing:
                return
            self._closing = True
            self._send(Stop())
        atexit.unregister(self.close)
        deadline = time.monotonic() + STOP_SECONDS
        while self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        self._process.kill()
        self._process.wait()
        if self._thread.is_alive():
            with self._changed:
                self._wake.send_multipart([b"", b""])
            self._thread.join()
        with self._changed:
            self._wake.close(linger=0)
            jobs, self._jobs = list(self._jobs.values()), {}
        for job in jobs:
            job.handle(Failure(job.name, WorkerDied("the stage was closed")))
        shutil.rmtree(self._folder, ignore_errors=True)

    # Messages.

    def _listen(self) -> None:
        """Carry messages between the threads of this process and the stage."""
        stage = self._connect()
        while True:
            ready = self._poll(stage)
            if self._outgoing in ready:
                name, data = self._outgoing.recv_multipart()
                if not data:  # from close
                    break
                if not name or name.decode() in self._jobs:
                    stage.send(data)
            if stage in ready:
                self._handle(pickle.loads(stage.recv()))
            elif self._process.poll() is not None:
                if not self._closing:
                    self._drain_messages(stage)
                stage.close()  # with what was meant for the dead process
                if not self._restarted():
                    # Whoever still sends, as `close` does, would wait for a reader for ever.
                    while self._outgoing.recv_multipart()[1]:
                        pass
                    break
                stage = self._connect()
            self._end_overdue()
        self._outgoing.close()
        stage.close()

    def _poll(self, stage: zmq.Socket[bytes]) -> set[zmq.Socket[bytes]]:
        poller = zmq.Poller()
        poller.register(self._outgoing, zmq.POLLIN)
        poller.register(stage, zmq.POLLIN)
        return {socket for socket, _ in poller.poll(200)}

    def _drain_messages(self, stage: zmq.Socket[bytes]) -> None:
        """Handle the messages that the process sent before it ended, such as the reason.

        The I/O thread of ZeroMQ may deliver them late. What was killed may have sent none.
        """
        status = self._process.returncode or 0
        seconds = KILLED_SECONDS if status < 0 else ENDED_SECONDS
        while not self._has_told_all(status) and stage.poll(round(1000 * seconds)):
            self._handle(pickle.loads(stage.recv()))

    def _has_told_all(self, status: int) -> bool:
        """Whether a process that has ended by itself has told why, or has answered all requests."""
        return (status > 0 and self._error is not None) or (status == 0 and not self._jobs)

    def _connect(self) -> zmq.Socket[bytes]:
        stage: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        for option, value in ((zmq.LINGER, 0), (zmq.SNDHWM, 0), (zmq.RCVHWM, 0)):
            stage.setsockopt(option, value)
        stage.connect(address(self._folder))
        stage.send(pickle.dumps(StatusRequest()))  # from now on it tells of every change
        return stage

    def _handle(self, message: object) -> None:
        match message:
            case Status():
                with self._changed:
                    self._status = message
                    self._answered += 1
                    self._changed.notify_all()
            case Failure(job=None, error=error):
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
            case Accepted(job=name) | ProgressUpdate(job=name) | PreviewUpdate(job=name):
                if (job := self._jobs.get(name)) is not None:
                    job.handle(message)
            case Done(job=name) | Failure(job=str(name)):
                job = self._jobs.pop(name, None)
                if job is not None:
                    job.handle(message)
                elif isinstance(message, Done) and isinstance(message.value, Path):
                    message.value.unlink(missing_ok=True)  # too late

    def _send(self, message: object, job: str = "") -> None:
        """Hand a message to the listening thread; one about a job is dropped with the job."""
        self._wake.send_multipart([job.encode(), pickle.dumps(message)])

    def _give_up(self, job: StageJob, error: Cosmos3Error) -> None:
        """End a job here and now; the stage is told, for when it listens."""
        with self._changed:
            known = self._jobs.pop(job.name, None)
            if not self._closing:
                self._send(Cancel(job.name))
        if known is not None:
            job.handle(Failure(job.name, error))

    def _end_overdue(self) -> None:
        """Keep the deadlines that the stage does not: it is stopped, or a rank hangs in a call."""
        now = time.monotonic()
        for job in list(self._jobs.values()):
            if now > job.overdue:
                self._give_up(job, DeadlineExceeded("the request has run out of its time"))

    def _check_open(self) -> None:
        if self._error is not None:
            raise self._error
        if self._closing:
            raise WorkerDied("the stage was closed")
        if self.silent:
            seconds = self.last_sign_of_life()
            raise WorkerDied(f"the stage has given no sign of life for {seconds:.0f} s; try again")

    # Life.

    def _start_process(self) -> subprocess.Popen[bytes]:
        setup = Setup(
            stage=replace(self._stage, scratch=self._folder),
            queue=self._queue,
            folder=self._folder,
            parent=os.getpid(),
            drain_seconds=self._drain_seconds,
        )
        temporary = tempfile.gettempdir()
        level = logging.getLogger("vllm").getEffectiveLevel()
        environment = {"VLLM_LOGGING_LEVEL": logging.getLevelName(level)}
        environment |= (QUIET if level > logging.WARNING else {}) | os.environ
        environment |= {
            # Sockets and rendezvous files of vLLM go where they are removed even after a SIGKILL.
            "TMPDIR": str(self._folder),
            # But Ray looks there for the cluster of this host.
            "RAY_TMPDIR": os.environ.get("RAY_TMPDIR", temporary),
            # What the compiler keeps is worth more than that.
            "TORCHINDUCTOR_CACHE_DIR": os.environ.get(
                "TORCHINDUCTOR_CACHE_DIR", f"{temporary}/torchinductor_{getuser()}"
            ),
        }
        environment |= {} if self.devices is None else {DEVICES: self.devices}
        return start_interpreter(environment, pickle.dumps(sys.path) + pickle.dumps(setup))

    def _restarted(self) -> bool:
        """Fail what the ended process was serving and start a new one. Whether there is one."""
        error = WorkerDied(f"the stage process ended with status {self._process.returncode}")
        with self._changed:
            if self._error is not None:  # which it has told
                error = WorkerDied(f"the stage ended: {self._error}")
            jobs, self._jobs = list(self._jobs.values()), {}
            was_up = self._status.state != "starting"
            if self._error is None and not self._closing:
                if was_up:
                    self._status = Status(state="starting")
                    self._start_again()
                else:
                    self._error = error
            if self._error is not None:
                self._status = Status(state="failed")
            alive = self._process.poll() is None
            self._changed.notify_all()
        for job in jobs:
            job.handle(Failure(job.name, error))
        return alive

    def _start_again(self) -> None:
        try:
            self._process = self._start_process()
            self.process_restarts += 1
        except OSError as error:  # such as no memory for it
            self._error = WorkerDied(f"the stage process cannot be started again ({error})")


def start_interpreter(environment: Mapping[str, str], told: bytes) -> subprocess.Popen[bytes]:
    """A new interpreter that runs a stage, and has been told where modules are and its `Setup`."""
    process = subprocess.Popen(
        [sys.executable, "-c", BOOTSTRAP],
        stdin=subprocess.PIPE,
        stdout=STDERR,  # vLLM logs there
        env=environment,
        start_new_session=True,  # Ctrl-C is for this process, which knows what to do about it
    )
    assert process.stdin is not None
    with process.stdin as pipe:
        pipe.write(told)
    return process


def _keep(_: str) -> None:
    """Calls between requests are not cancelled."""
