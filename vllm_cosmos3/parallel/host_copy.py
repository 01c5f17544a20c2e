"""Copies of tensors in the host's memory, from which a device gets them back bit by bit.

For such a copy to go at the speed of the bus its memory is pinned, and pinning takes much longer than
the copy. So the memory is our own: torch keeps what it has pinned as well, but gives all of it back to
the system whenever a CUDA graph is recorded.
"""

from __future__ import annotations

import gc
import logging
import mmap
import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

ALIGNMENT = 256  # bytes between the starts of two tensors, as torch's allocator keeps them
BUFFER = 1 << 30  # bytes, from which another buffer is begun: one thread makes one at a time
THREADS = 8
PORTABLE = 1  # flag of cudaHostRegister: pinned for every device


class HostCopy:
    """``tensors`` in the host's memory, pinned where they come from a GPU.

    The memory is made by the first ``save`` and kept until nobody refers to this any more. ``buffer`` is
    about how many bytes of it are made at a time.
    """

    def __init__(self, tensors: Iterable[Tensor], buffer: int = BUFFER) -> None:
        self._tensors = [(tensor, tensor.device) for tensor in tensors]
        self._buffer = buffer
        self._copies: list[Tensor] = []
        self._saved = False

    def save(self) -> None:
        """Copy the tensors, unless they are what they were the last time: see `changed`."""
        if self._saved:
            return
        if not self._copies:
            self._copies = self._make_copies()
        for (tensor, _), copy in zip(self._tensors, self._copies, strict=True):
            copy.copy_(tensor, non_blocking=True)
        self._synchronize()
        self._saved = True

    def changed(self) -> None:
        """What was saved is not valid any more."""
        self._saved = False

    def release(self) -> None:
        """Let the tensors be the copies, so that nothing of them is left on a device."""
        for (tensor, _), copy in zip(self._tensors, self._copies, strict=True):
            tensor.data = copy

    def bring_back(self) -> None:
        """Undo `release`. After a failure, such as a lack of memory, it has not begun."""
        try:
            for (tensor, device), copy in zip(self._tensors, self._copies, strict=True):
                tensor.data = torch.empty_like(copy, device=device).copy_(copy, non_blocking=True)
        except BaseException:
            self.release()
            raise
        self._synchronize()

    def put_back(self) -> None:
        """Write what was saved over what the tensors are now."""
        for (tensor, _), copy in zip(self._tensors, self._copies, strict=True):
            tensor.data.copy_(copy, non_blocking=True)
        self._synchronize()

    def _make_copies(self) -> list[Tensor]:
        """Memory for each tensor, in buffers that several threads make."""
        groups = list(_grouped([tensor for tensor, _ in self._tensors], self._buffer))
        with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
            buffers = list(pool.map(_host_memory, map(_nbytes, groups)))
            if (device := self._gpu) is not None:
                pinned = [b for b, ok in zip(buffers, pool.map(partial(_pin, device), buffers), strict=True) if ok]  # fmt: skip
                # Not at the end of the process, with which it ends anyway.
                weakref.finalize(self, _unpin, pinned).atexit = False
        return [
            copy
            for group, buffer in zip(groups, buffers, strict=True)
            for copy in _parts(group, buffer)
        ]

    @property
    def _gpu(self) -> torch.device | None:
        return next((device for _, device in self._tensors if device.type == "cuda"), None)

    def _synchronize(self) -> None:
        if any(device.type != "cpu" for _, device in self._tensors):
            torch.accelerator.synchronize()


def tensors_of(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    """Each parameter and buffer once."""
    seen: set[int] = set()
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor


def free_caches() -> None:
    """Give memory that nothing refers to any more back to the devices."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def _grouped(tensors: Iterable[Tensor], most: int) -> Iterator[list[Tensor]]:
    """Neighbours that share a buffer: until they have ``most`` bytes."""
    group: list[Tensor] = []
    for tensor in tensors:
        group.append(tensor)
        if _nbytes(group) >= most:
            yield group
            group = []
    if group:
        yield group


def _nbytes(tensors: Sequence[Tensor]) -> int:
    return sum(padded(tensor) for tensor in tensors)


def padded(tensor: Tensor) -> int:
    """Bytes of a tensor in a buffer of several."""
    size: int = -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return size


def _parts(tensors: Iterable[Tensor], buffer: Tensor) -> Iterator[Tensor]:
    """A part of ``buffer`` for each tensor, with its type, its shape, and the order of its values."""
    start = 0
    for tensor in tensors:
        strides = torch.empty_like(tensor, device="meta").stride()
        own = buffer[start : start + tensor.nbytes].view(tensor.dtype)
        yield own.as_strided(tensor.shape, strides, own.storage_offset())
        start += padded(tensor)


def _host_memory(size: int) -> Tensor:
    """Bytes [size] with their pages in place, which is what takes the time; large pages where there are some."""
    region = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        region.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(region, dtype=torch.uint8)  # which keeps the region
    memory[:: mmap.PAGESIZE] = 0
    return memory


def _pin(device: torch.device, memory: Tensor) -> bool:
    """Pin ``memory``; where that cannot be, copies are slower and that is all."""
    with torch.cuda.device(device):  # this thread has an idea of its own of the current one
        cudart = torch.cuda.cudart()
        error = int(cudart.cudaHostRegister(memory.data_ptr(), memory.nbytes, PORTABLE))
    if error:
        logger.warning(
            "%d bytes of the host's memory were not pinned: CUDA error %d", memory.nbytes, error
        )
    return not error


def _unpin(pinned: Iterable[Tensor]) -> None:
    cudart = torch.cuda.cudart()
    for memory in pinned:
        cudart.cudaHostUnregister(memory.data_ptr())
