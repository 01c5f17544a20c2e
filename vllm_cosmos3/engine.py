"""`Cosmos3`: images and videos from Python.

Loads a checkpoint once and runs requests one after the other, or on each replica one; those of one
batch share their steps. In the calling process, or with several ranks in processes that import nothing
of the caller, so scripts need no ``__main__`` guard and notebooks work.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Unpack, overload

import torch

from vllm_cosmos3 import bars
from vllm_cosmos3.batch.downloads import local_files, local_image, urls_of
from vllm_cosmos3.checkpoint.hub import resolve
from vllm_cosmos3.closing import Closing
from vllm_cosmos3.engine_options import DEFAULTS, OPTIONS, EngineOptions
from vllm_cosmos3.errors import Cosmos3Error, InvalidRequest, Sleeping
from vllm_cosmos3.generator.models.components import loaded_values
from vllm_cosmos3.generator.output import Output, Progress, Report, Sample
from vllm_cosmos3.media import Clip
from vllm_cosmos3.parallel.checks import check_backend
from vllm_cosmos3.request.batching import with_batch
from vllm_cosmos3.request.fields import with_arguments
from vllm_cosmos3.request.foreign_names import own_names
from vllm_cosmos3.request.keywords import Keywords
from vllm_cosmos3.request.plan import Plan
from vllm_cosmos3.request.planner import make_plan
from vllm_cosmos3.request.prompts import load_tokenizer
from vllm_cosmos3.request.request import FIELD_DEFAULTS, SPECS, GenerateRequest, from_fields
from vllm_cosmos3.request.world import (
    SESSION_DEFAULTS,
    SESSION_SPECS,
    ChunkPlan,
    make_world,
    session_request,
)
from vllm_cosmos3.session import Session
from vllm_cosmos3.stage.maintenance import ENDING
from vllm_cosmos3.stage.runners import Runner, make_runner

__all__ = ["Cosmos3", "Output", "Progress", "Sample"]

_PAUSES = {  # calls between requests, and why nothing is generated after them
    "sleep": "sleeps; call wake_up() first",
    "wake_up": "",
    "start_weight_update": "is being updated; call finish_weight_update() first",
    "finish_weight_update": "",
}
Request = GenerateRequest | Mapping[str, Any] | str  # a string is a prompt
Shown = Report | bool | None  # what is done with the progress: told, shown or not, shown if seen
P = ParamSpec("P")


@dataclass(frozen=True, slots=True)
class _Options(EngineOptions):
    """`EngineOptions`, and what Python alone takes."""

    progress: bool | None = None

    def __post_init__(self) -> None:
        if isinstance(self.dtype, torch.dtype):
            object.__setattr__(self, "dtype", str(self.dtype).removeprefix("torch."))
        super(_Options, self).__post_init__()


def _takes(
    options: Callable[P, _Options],
) -> Callable[[Callable[[Cosmos3, _Options], None]], Callable[Concatenate[Cosmos3, P], None]]:
    """Make an ``__init__`` that takes the arguments of the options of one that takes the options."""

    def decorated(
        init: Callable[[Cosmos3, _Options], None],
    ) -> Callable[Concatenate[Cosmos3, P], None]:
        def load(self: Cosmos3, /, *args: P.args, **arguments: P.kwargs) -> None:
            init(self, options(*args, **arguments))

        signature = inspect.signature(options)
        self_first = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)]
        signature = signature.replace(parameters=[*self_first, *signature.parameters.values()])
        load.__signature__ = signature  # type: ignore[attr-defined]
        specs = {name: option.spec for name, option in OPTIONS.items()}
        load.__doc__ = with_arguments(init.__doc__, specs, DEFAULTS)
        return load

    return decorated


class _Slots:
    """So many requests at a time, whatever threads ask; a list takes all slots."""

    def __init__(self, count: int) -> None:
        self._count, self._free = count, threading.Semaphore(count)
        self._taking = threading.Lock()  # by one thread after the other, which may need several

    @contextmanager
    def taken(self, *, all_of_them: bool) -> Iterator[None]:
        with ExitStack() as slots:
            with self._taking:
                for _ in range(self._count if all_of_them else 1):
                    slots.enter_context(self._free)
            yield


class Cosmos3(Closing):
    """A Cosmos 3 generator.

        with Cosmos3("nvidia/Cosmos3-Nano") as model:
            model.generate(prompt="A paper boat on a stream").save("boat.mp4")

    It takes what `EngineOptions` takes.

    Raises:
        CheckpointError: the checkpoint is missing, incomplete or of another kind.
        InvalidRequest: an option has a value that cannot be served here.
    """

    @_takes(_Options)
    def __init__(self, options: _Options) -> None:
        """Load a checkpoint.

        ``model`` is a folder in the published layout, a Hugging Face repository, or a short name
        such as demo. ``progress`` is
        whether bars show how far loading and requests are; by default they do on a terminal and in
        a notebook.
        """
        start = time.perf_counter()
        check_backend(options.attention_backend)
        device, indices = device_indices(options.device)
        self.device = device_of(device)
        config = options.on(resolve(options.model, options.revision), str(self.device))
        memory = _memory_of(self.device)
        self._config, self._model = config.limited(memory), config.read_model()
        self._tokenizer = load_tokenizer(config.model)
        self._shows = bars.are_seen() if options.progress is None else options.progress
        loading = bars.loading_bar(loaded_values(self._model)) if self._shows else _silent()
        with loading as loaded:
            self._runner: Runner | None = make_runner(config, loaded, indices, memory)
        self._slots = _Slots(self._runner.replicas * self._runner.max_batch_size)
        self._sessions = 0  # so far, by which ranks that were started together name them alike
        self._paused = ""  # why nothing is generated
        self.load_seconds = time.perf_counter() - start

    @classmethod
    def from_pretrained(cls, model: str | Path, **options: Any) -> Cosmos3:
        """`Cosmos3` by the name of other libraries; ``torch_dtype`` is ``dtype``."""
        if "torch_dtype" in options:
            options["dtype"] = options.pop("torch_dtype")
        return cls(model, **options)

    @overload
    def generate(  # type: ignore[overload-overlap] # a string is a sequence of strings, too
        self,
        requests: Request | None = None,
        *,
        progress: Shown = None,
        clip: Clip | None = None,
        **fields: Unpack[Keywords],
    ) -> Output: ...

    @overload
    def generate(
        self, requests: Sequence[Request], *, progress: Shown = None, **fields: Unpack[Keywords]
    ) -> list[Output]: ...

    def generate(
        self,
        requests: Request | Sequence[Request] | None = None,
        *,
        progress: Shown = None,
        clip: Clip | None = None,
        **fields: Any,
    ) -> Output | list[Output]:
        """Run one request, given by its fields, or several.

        ``requests`` is a prompt, a mapping of fields or a `GenerateRequest`, or a list of those,
        which gives a list of outputs; so does a list of prompts as ``prompt``. Fields given by name
        hold for all of a list, instead of its own, and all are checked before the first one runs.
        Replicas (``data_parallel_size``) share a list, and requests in it that may be one batch their
        steps (``max_batch_size``).
        Pictures and clips are files, URLs, bytes, pictures of Pillow, arrays or tensors.

        Bars show the progress on a terminal and in a notebook, unless ``progress`` is False. It may
        be a function, which is called after every step; what it raises ends the request. The video
        of a single request is written to ``clip`` while it is decoded; `Output.save` to the same
        path then has nothing to do, as long as the file is there.

        Names of diffusers, vLLM-Omni and the Cosmos Framework are taken for ours where they mean
        the same, such as ``num_steps`` and ``num_videos_per_prompt``.

        Raises:
            InvalidRequest: a field has a value that cannot be served.
        """
        return self._generate(requests, fields, progress, threading.Event(), clip)

    __call__ = generate  # as pipelines of diffusers are called

    async def agenerate(
        self,
        requests: Request | Sequence[Request] | None = None,
        *,
        progress: Shown = None,
        **fields: Unpack[Keywords],
    ) -> Output | list[Output]:
        """`generate` without blocking the event loop; cancelling it stops at the next step.

        ``progress`` is called in another thread.
        """
        cancelled = threading.Event()
        work = asyncio.to_thread(self._generate, requests, fields, progress, cancelled)
        try:
            return await work
        finally:
            cancelled.set()

    def plan(self, requests: Request | None = None, /, **fields: Unpack[Keywords]) -> Plan:
        """What a request comes to, without running it: checks it whole."""
        self._open()
        return self._planned(_request(requests, fields))

    def session(self, prompt: str = "", **fields: Any) -> Session:
        """A session of a causal simulator: a world that answers to actions, chunk by chunk.

        Its first frame is there when this returns. Close it, or use it in a ``with`` block: until then
        its history stays on the devices.

        Raises:
            InvalidRequest: a field has a value that cannot be served, or the checkpoint is no simulator.
            OutOfMemory: its history does not fit beside those of the sessions that are open.
        """
        request = session_request({"prompt": prompt, **fields})
        with self._slots.taken(all_of_them=False):
            runner = self._awake()
            self._sessions += 1
            with runner.raising_together("the session"), local_image(request) as local:
                world = make_world(local, self._model, self._tokenizer, f"session-{self._sessions}")
        return Session(world, self._run_chunk, self._release)

    def sleep(self) -> None:
        """Leave the weights in the host's memory, for others to use the devices. Waits for a running request.

        Until `wake_up` nothing is generated.
        """
        self._maintain("sleep")

    def wake_up(self) -> None:
        """Bring the weights back to the devices, bit by bit what they were.

        Raises:
            OutOfMemory: others have taken the room meanwhile; it still sleeps then.
        """
        self._maintain("wake_up")

    def init_weight_transfer_engine(self, init_info: Mapping[str, Any]) -> None:
        """Meet a trainer, as vLLM's backend ``weight_transfer`` has it; for files there is nobody to meet."""
        self._maintain("init_weight_transfer_engine", dict(init_info))

    def start_weight_update(self) -> None:
        """Begin to take new weights of the transformer. Until the update ends nothing is generated."""
        self._maintain("start_weight_update")

    def update_weights(self, update_info: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Take some tensors of the checkpoint: of files those in ``{"path": FILE_OR_FOLDER}``.

        Raises:
            InvalidRequest: a tensor is unknown or misshapen; the update has ended, the old weights are back.
        """
        self._maintain("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Generate with the new weights from now on."""
        self._maintain("finish_weight_update", weight_version)

    def _maintain(self, method: str, *args: Any) -> None:
        with self._slots.taken(all_of_them=True):
            try:
                self._open().maintain(method, *args)
            except Exception:
                if method in ENDING and self._paused == _PAUSES["start_weight_update"]:
                    self._paused = ""
                raise
            self._paused = _PAUSES.get(method, self._paused)

    @property
    def is_sleeping(self) -> bool:
        """Whether the weights are in the host's memory."""
        return self._paused == _PAUSES["sleep"]

    def close(self) -> None:
        """Free the models and their memory, and end their processes. Waits for a running request."""
        with self._slots.taken(all_of_them=True):
            runner, self._runner = self._runner, None
        if runner is not None:
            runner.close()

    def _open(self) -> Runner:
        if self._runner is None:
            raise Cosmos3Error("this Cosmos3 is closed; make a new one")
        return self._runner

    def _awake(self) -> Runner:
        runner = self._open()
        if self._paused:
            raise Sleeping(f"this Cosmos3 {self._paused}")
        return runner

    def _generate(
        self,
        requests: Request | Sequence[Request] | None,
        fields: Mapping[str, Any],
        progress: Shown,
        cancelled: threading.Event,
        clip: Clip | None = None,
    ) -> Output | list[Output]:
        prompts = fields.get("prompt")
        if requests is None and isinstance(prompts, list | tuple):
            requests = [{"prompt": prompt} for prompt in prompts]
            fields = {name: value for name, value in fields.items() if name != "prompt"}
        several = isinstance(requests, Sequence) and not isinstance(requests, str)
        if several and clip is not None:
            raise InvalidRequest("clip", str(clip.path), "for a single request")
        if clip is not None:  # another process writes it, in a working directory of its own
            clip = replace(clip, path=Path(clip.path).resolve())
        given = requests if several else [requests]
        with self._slots.taken(all_of_them=several):
            runner = self._awake()
            with runner.raising_together("the request"):
                asked = [_request(one, fields) for one in given]  # type: ignore[union-attr, arg-type]
                plans = [self._planned(one) for one in asked]
            concurrency = _concurrency(runner, plans)
            if concurrency == 1:
                outputs = self._run_sequentially(runner, plans, progress, cancelled, clip, several)
            else:
                outputs = self._run_concurrently(runner, plans, progress, cancelled, concurrency)
        outputs = [
            replace(output, effective={**output.effective, **urls_of(one)})
            for output, one in zip(outputs, asked, strict=True)
        ]
        return outputs if several else outputs[0]

    def _run_chunk(self, plan: ChunkPlan) -> Output:
        with self._slots.taken(all_of_them=False):
            return self._awake().run(plan, _ignore, threading.Event())

    def _release(self, session: str) -> None:
        with self._slots.taken(all_of_them=False):
            if self._runner is not None:
                self._runner.release(session)

    def _planned(self, request: GenerateRequest) -> Plan:
        with local_files(request) as local:
            plan = make_plan(local, self._model, self._tokenizer)
        limit = self._config.batch_size(exact=plan.parameters.preset == "exact")
        patch = self._model.transformer.latent_patch_size
        return with_batch(plan, patch=patch, limit=limit)

    def _reports(
        self, progress: Shown, plans: Sequence[Plan], *, several: bool
    ) -> Iterator[AbstractContextManager[Report]]:
        """What is told the progress of each request."""
        if callable(progress):
            return repeat(nullcontext(progress))
        if not (self._shows if progress is None else progress):
            return repeat(nullcontext(_ignore))
        return bars.each_of(len(plans)) if several else iter([bars.request_bars()])

    def _run_sequentially(
        self,
        runner: Runner,
        plans: Sequence[Plan],
        progress: Shown,
        cancelled: threading.Event,
        clip: Clip | None,
        several: bool,  # noqa: FBT001
    ) -> list[Output]:
        outputs = []
        for reporting, plan in zip(
            self._reports(progress, plans, several=several), plans, strict=False
        ):
            with reporting as report:
                outputs.append(self._run(runner, plan, report, cancelled, clip))
        return outputs

    def _run_concurrently(
        self,
        runner: Runner,
        plans: Sequence[Plan],
        progress: Shown,
        cancelled: threading.Event,
        concurrency: int,
    ) -> list[Output]:
        """Run several requests concurrently, on all replicas. The first that fails cancels the others."""
        shown = self._shows if progress is None else progress is True
        report = progress if callable(progress) else _ignore
        with (
            bars.requests_bar(len(plans)) if shown else nullcontext(_ignore) as ended,
            ThreadPoolExecutor(concurrency) as pool,
        ):
            runs = {
                at: pool.submit(self._run, runner, plans[at], report, cancelled, None)
                for at in _batch_order(plans)
            }
            try:
                for one in as_completed(runs.values()):
                    one.result()
                    ended(None)
            except BaseException:
                cancelled.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [runs[at].result() for at in range(len(plans))]

    def _run(
        self,
        runner: Runner,
        plan: Plan,
        report: Report,
        cancelled: threading.Event,
        clip: Clip | None,
    ) -> Output:
        start = time.perf_counter()
        output = runner.run(plan, report, cancelled, clip)
        total = time.perf_counter() - start
        timings = {"model_load": self.load_seconds, **output.timings, "total": total}
        return replace(output, timings=timings)


def _concurrency(runner: Runner, plans: Sequence[Plan]) -> int:
    """How many requests of a list run concurrently: a full batch on each replica, if any can be batched."""
    sizes = (1 if plan.batch is None else plan.batch.size for plan in plans)
    return min(len(plans), runner.replicas * min(runner.max_batch_size, max(sizes, default=1))) or 1


def _batch_order(plans: Sequence[Plan]) -> list[int]:
    """The indices of a list in the order in which they start: requests of one batch are adjacent."""
    first: dict[object, int] = {}
    return sorted(range(len(plans)), key=lambda at: first.setdefault(plans[at].batch or at, at))


def _request(given: Request | None, fields: Mapping[str, Any]) -> GenerateRequest:
    """A request as it was given, with the fields that were given by name."""
    fields = own_names(fields)
    if isinstance(given, GenerateRequest):
        return replace(given, **fields) if fields else given
    known = {"prompt": given} if isinstance(given, str) else own_names(given or {})
    return from_fields({**known, **fields})


def device_indices(device: str | None) -> tuple[str | None, tuple[int, ...]]:
    """The device type and the indices of a list such as cuda:0,0; any other device unchanged."""
    kind, _, listed = (device or "").partition(":")
    indices = listed.split(",")
    if len(indices) > 1 and all(index.strip().isdecimal() for index in indices):
        return kind, tuple(map(int, indices))
    return device, ()


def device_of(name: str | None) -> torch.device:
    """The device to run on; vLLM's layers run on the kind of device vLLM was built for."""
    from vllm.platforms import current_platform

    built_for = current_platform.device_type
    device: torch.device | None
    try:
        device = torch.device(built_for if name is None else str(name))
    except RuntimeError:
        device = None
    if device is None or device.type != built_for:
        raise InvalidRequest("device", name, f"{built_for}, for the vLLM installed here")
    return device


def _memory_of(device: torch.device) -> int | None:
    """Bytes of a device; None where nobody counts."""
    from vllm.platforms import current_platform

    return None if device.type == "cpu" else int(current_platform.get_device_total_memory())


def _ignore(_: Progress | None) -> None:
    return None


def _silent() -> AbstractContextManager[Callable[[int], None]]:
    return nullcontext(lambda _: None)


for _method in (Cosmos3.generate, Cosmos3.agenerate):
    _method.__doc__ = with_arguments(_method.__doc__, SPECS, FIELD_DEFAULTS)
Cosmos3.session.__doc__ = with_arguments(Cosmos3.session.__doc__, SESSION_SPECS, SESSION_DEFAULTS)
