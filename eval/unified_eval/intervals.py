"""Confidence intervals: Wilson's for shares, the bootstrap for means and other statistics of grouped values."""

from collections.abc import Callable, Hashable, Sequence

import numpy as np
from scipy import stats

Interval = tuple[float, float]


def wilson_interval(hits: int, count: int, level: float = 0.95) -> Interval:
    """Wilson's interval of a share ``hits / count`` of independent trials; never empty, also at 0 and 1.

    Raises:
        ValueError: if ``count`` is below 1 or ``hits`` is not within 0 and ``count``.

    Source: Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953.
    """
    if count < 1 or not 0 <= hits <= count:
        raise ValueError(f"hits, count: {hits} of {count} is no share; give 0 <= hits <= count and count >= 1.")
    found = stats.binomtest(hits, count).proportion_ci(level, method="wilson")
    return float(found.low), float(found.high)


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    groups: Sequence[Hashable] | None = None,
    statistic: Callable[[np.ndarray], float] | None = None,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval that draws whole groups, so that pictures of one prompt stay together.

    Args:
        values: N numbers, or ``(N, D)`` rows; one for each picture.
        groups: the prompt of each picture; without it every picture is its own group.
        statistic: what is computed from the drawn rows; the mean without it.
        resamples: how often groups are drawn.
        level: share of the resamples that the interval holds.
        seed: seed of the draws.

    Returns:
        Lower and upper end.

    Raises:
        ValueError: if there are fewer than 2 groups, a value is not finite, or lengths or numbers do not fit.
    """
    rows = np.asarray(values, dtype=np.float64)
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(f"resamples, level: need 1 or more and a share inside (0, 1), got {resamples} and {level}.")
    if not np.isfinite(rows).all():
        raise ValueError(f"values: number {int(np.argwhere(~np.isfinite(rows))[0][0])} is not finite.")
    if groups is not None and len(groups) != len(rows):
        raise ValueError(f"groups: {len(groups)} for {len(rows)} values; give one for each.")
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(range(len(rows)) if groups is None else groups):
        members.setdefault(group, []).append(index)
    if len(members) < 2:
        raise ValueError(f"groups: {len(members)} of them; an interval over prompts needs 2 or more.")
    parts = [np.array(part) for part in members.values()]
    chance = np.random.default_rng(seed)
    draws = chance.integers(len(parts), size=(resamples, len(parts)))
    if statistic is None and rows.ndim == 1:  # the mean of drawn groups is a ratio of two sums: no loop is needed
        sums, sizes = np.array([rows[part].sum() for part in parts]), np.array([len(part) for part in parts])
        results = sums[draws].sum(1) / sizes[draws].sum(1)
    elif statistic is None:
        raise ValueError("statistic: rows of several numbers have no single mean; say what to compute from them.")
    else:
        results = np.array([statistic(rows[np.concatenate([parts[i] for i in draw])]) for draw in draws])
    low, high = np.quantile(results, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
