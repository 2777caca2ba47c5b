"""Side-by-side timing on a noisy machine: interleaved rounds, paired ratios."""

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

Timings = dict[str, list[tuple[float, float]]]


def interleaved(functions: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 1, repeat: int = 1) -> Timings:
    """Run functions in rounds A B C, A B C, so that drift of the machine hits all of them alike.

    Args:
        functions: the functions to time, by name.
        rounds: measured rounds.
        warmup: rounds before those, not measured.
        repeat: calls of each function in a round.

    Returns:
        For every name one ``(wall seconds, CPU seconds of the process)`` per call and round.
    """
    timings: Timings = {name: [] for name in functions}
    for number in range(warmup + rounds):
        for name, function in functions.items():
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(repeat):
                function()
            if number >= warmup:
                timings[name].append(((time.perf_counter() - wall) / repeat, (time.process_time() - cpu) / repeat))
    return timings


def paired_ratio(timings: Timings, slow: str, fast: str, scale: float = 1.0, cpu: bool = False) -> dict[str, Any]:
    """How many times faster ``fast`` is than ``slow``: median and range of the ratios within rounds.

    Args:
        timings: from :func:`interleaved`.
        slow, fast: names in it.
        scale: work of ``fast`` per call, relative to that of ``slow``.
        cpu: compare CPU seconds instead of wall seconds.
    """
    column = int(cpu)
    ratios = [scale * s[column] / f[column] for s, f in zip(timings[slow], timings[fast], strict=True)]
    return {"ratio": round(median(ratios), 3), "spread": [round(min(ratios), 3), round(max(ratios), 3)]}


def compared(timings: Timings, slow: str, fast: str, scale: float = 1.0) -> dict[str, Any]:
    """:func:`paired_ratio` of wall time, and of CPU time under ``cpu``: the steadier one where others use the machine."""
    return paired_ratio(timings, slow, fast, scale) | {"cpu": paired_ratio(timings, slow, fast, scale, cpu=True)}
