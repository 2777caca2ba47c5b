"""Confidence intervals: Wilson's for shares, the bootstrap for means and other statistics of grouped values."""

from collections.abc import Callable, Hashable, Iterator, Sequence

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


def share_interval(hits: Sequence[bool] | np.ndarray, groups: Sequence[Hashable], seed: int = 0) -> Interval:
    """Interval of a share of images of which several may belong to one group (prompt).

    Wilson's if every image has its own group, else a bootstrap over groups. A share of 0 or 1, from which a bootstrap
    would get no width, gets Wilson's of as many trials as there are groups.

    Raises:
        ValueError: if the lists are empty or differ in length.
    """
    values, distinct = np.asarray(hits, dtype=np.float64), len(set(groups))
    if len(values) != len(groups) or not distinct:
        raise ValueError(f"hits, groups: {len(values)} and {len(groups)}; give as many of both, 1 or more.")
    if distinct == len(groups) or values.mean() in (0, 1):
        return wilson_interval(round(float(values.mean()) * distinct), distinct)
    return bootstrap_interval(values, groups, seed=seed) if distinct > 1 else (0.0, 1.0)  # one prompt tells nothing


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    groups: Sequence[Hashable] | None = None,
    statistic: Callable[[np.ndarray], float] | None = None,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval that resamples whole groups, so that images of one prompt stay together.

    Args:
        values: N numbers or ``(N, D)`` rows, one for each image.
        groups: the prompt of each image; without it every image is its own group.
        statistic: what is computed from the resampled rows; their mean without it.
        resamples: how often groups are resampled.
        level: share of the resamples that the interval holds.
        seed: seed of the resampling.

    Returns:
        Lower and upper end.

    Raises:
        ValueError: if there are fewer than 2 groups, a value is not finite, or lengths differ.
    """
    rows = np.asarray(values, dtype=np.float64)
    if not 0 < level < 1:
        raise ValueError(f"level: {level} is not inside (0, 1).")
    if not np.isfinite(rows).all():
        raise ValueError(f"values: number {int(np.argwhere(~np.isfinite(rows))[0][0])} is not finite.")
    if groups is not None and len(groups) != len(rows):
        raise ValueError(f"groups: {len(groups)} for {len(rows)} values; give one for each.")
    of_rows = statistic or (lambda some: float(some.mean()))
    resampled = resample(range(len(rows)) if groups is None else groups, resamples, seed)
    results = [of_rows(rows[indices]) for indices in resampled]
    low, high = np.quantile(results, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def resample(groups: Sequence[Hashable], resamples: int = 2000, seed: int = 0) -> Iterator[np.ndarray]:
    """Sample as many groups as there are, with replacement, ``resamples`` times.

    One seed samples the same groups of any two sets of rows, which is what paired intervals need.

    Yields:
        The row numbers of the sampled groups, int64; of another length each time if groups differ in size.

    Raises:
        ValueError: if there are fewer than 2 groups or ``resamples`` is below 2.
    """
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    if len(members) < 2 or resamples < 2:
        raise ValueError(f"groups, resamples: {len(members)} and {resamples}; an interval needs 2 or more of both.")
    parts = [np.array(part) for part in members.values()]
    samples = np.random.default_rng(seed).integers(len(parts), size=(resamples, len(parts)))
    if len(parts) == len(groups):
        yield from samples
        return
    for sample in samples:
        yield np.concatenate([parts[index] for index in sample])


def interval_around(value: float, resampled: Sequence[float] | np.ndarray, level: float = 0.95) -> Interval:
    """Normal interval around a value, with the standard deviation of its values on resampled prompts.

    For distances between sets of images: a resampled set repeats images, which makes the distance itself larger, so that
    the percentiles of the resampled values lie beside the value. Only their spread is used.
    """
    half = float(stats.norm.ppf((1 + level) / 2) * np.std(np.asarray(resampled), ddof=1))
    return value - half, value + half
