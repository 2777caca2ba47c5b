"""SIGTERM and Ctrl-C let a run finish its step and write a checkpoint."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator

from unified.training.tracking import sum_over_processes


@contextmanager
def catch_signals(accelerator: Accelerator) -> Iterator[Callable[[], bool]]:
    """Catch SIGTERM and SIGINT; yields a function that says whether the run should stop.

    Call it between steps, on all processes: they get the same answer, true once any of them has received a signal. A second
    signal acts at once, as without this. Start the workers of data loaders inside, so that Ctrl-C does not end them first.
    """
    received: list[int] = []
    main_process, own = accelerator.is_main_process, os.getpid()

    def note(number: int, frame: Any) -> None:
        received.append(number)
        if os.getpid() != own:
            return  # a worker that inherited the handler
        restore()
        if main_process:  # not print, which may be interrupted itself
            text = f"\n{signal.Signals(number).name}: the run stops after this step; once more stops it at once.\n"
            os.write(2, text.encode())

    in_main_thread = threading.current_thread() is threading.main_thread()  # elsewhere Python allows no handlers
    numbers = (signal.SIGTERM, signal.SIGINT) if in_main_thread else ()
    before = {number: signal.signal(number, note) for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        yield lambda: bool(sum_over_processes(accelerator, [float(len(received))])[0])
    finally:
        restore()
