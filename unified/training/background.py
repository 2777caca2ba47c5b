"""Writing beside the training: one thread in each process, one piece of work at a time."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions


class Background:
    """A thread that writes while the training goes on; made, and given the same work, by all processes. As a context it waits
    for its work, however the training ends.

    Attributes:
        group: the processes' threads, which must not mix their messages with those of the training; None for one process.
    """

    def __init__(self, accelerator: Accelerator):
        self.group: dist.ProcessGroup | None = (
            cast(dist.ProcessGroup, dist.new_group(backend="gloo")) if accelerator.num_processes > 1 else None
        )
        on_gpu = accelerator.device.type == "cuda"
        self._stager = DefaultStager(StagingOptions(on_gpu, False, False, False))
        start: dict[str, Any] = (
            {"initializer": torch.cuda.set_device, "initargs": (accelerator.device,)} if on_gpu else {}
        )
        self._pool = ThreadPoolExecutor(1, "unified-background", **start)
        self._running: Future[None] | None = None

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            self._stager.close()

    def copy(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """Tensors of nested dicts in CPU memory, which the next copy takes again: only after :meth:`wait`."""
        copied: Any = self._stager.stage(tensors)
        return dict(copied)

    def start(self, work: Callable[[], None]) -> None:
        """Begin work, once that before it is done; raises as :meth:`wait`."""
        self.wait()
        self._running = self._pool.submit(work)

    def check(self) -> None:
        """Raise the error of work that has failed."""
        if self._running is not None and self._running.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the work that is under way; raises its error."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def barrier(self) -> None:
        """Inside work: wait for the threads of all processes."""
        if self.group is not None:
            dist.barrier(self.group)
