"""Metrics with intervals and recipes, and the difference of two sets of metrics on the same prompts."""

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from unified_eval.intervals import Interval, bootstrap_interval, interval_around, resample, share_interval

# Images that the published form of a metric has, at least, and what to use below that.
ENOUGH = {
    "frechet": (10_000, "report the kernel distance, which has no bias, or sample more"),
    "neighbourhoods": (1_000, "compare at equal N only, or sample more"),
    "inception score": (5_000, "draw more, or leave it out"),
}


class SmallSampleWarning(UserWarning):
    """A metric of so few images that it says more about their number than about them."""


@dataclass
class Measures:
    """Metrics by name, with what explains and what compares them.

    Attributes:
        prompts: N prompts, all different; an interval generates them, never single images.
        resamples: how often distances are computed again on generated prompts; 0 for distances without intervals.
        seed: seed of all draws. Two sets of metrics sampled by one seed can be compared in pairs.
        metrics: numbers by name.
        intervals: 95 % intervals by name, for metrics that have one.
        recipes: for each metric what decides its value, with ``label``, the name to print.
        notes: warnings about metrics of too few images.
        rows: for metrics that are means, the value and the prompt of every image.
        generates: for distances, the values on generated prompts.
    """

    prompts: Sequence[str]
    resamples: int = 200
    seed: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, Interval] = field(default_factory=dict)
    recipes: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    rows: dict[str, tuple[np.ndarray, list[Hashable]]] = field(default_factory=dict)
    draws: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, name: str, value: float, label: str, **recipe: Any) -> None:
        """Add a metric without interval."""
        self.figures[name] = float(value)
        self.recipes[name] = {"label": label, **recipe}

    def add_mean(
        self, name: str, values: np.ndarray, label: str, groups: Sequence[Hashable] | None = None, **recipe: Any
    ) -> None:
        """Add the mean of a value of every image; ``groups`` are their prompts (one image each without it)."""
        groups = list(self.prompts if groups is None else groups)
        self.add(name, float(values.mean()), label, n=len(values), **recipe)
        self.rows[name] = (values, groups)
        if np.isin(values, (0, 1)).all():
            self.intervals[name] = share_interval(values, groups, self.seed)
        elif len(set(groups)) > 1:
            self.intervals[name] = bootstrap_interval(values, groups, seed=self.seed)

    def add_distance(
        self,
        name: str,
        distance: Callable[[np.ndarray, np.ndarray], float],
        a: np.ndarray,
        b: np.ndarray,
        label: str,
        **recipe: Any,
    ) -> None:
        """Add a distance of two sets of features that have a row for each prompt, in order."""
        self.add(name, distance(a, b), label, n=len(a), n_reference=len(b), **recipe)
        if self.resamples:
            drawn = resample(range(len(self.prompts)), self.resamples, self.seed)
            self.draws[name] = np.array([distance(a[rows], b[rows]) for rows in drawn])
            self.intervals[name] = interval_around(self.figures[name], self.draws[name])

    def check_size(self, kind: str, count: int) -> None:
        """Warn, and keep a note, if ``count`` images are few for a kind of metric in :data:`ENOUGH`."""
        enough, fix = ENOUGH[kind]
        note = f"{kind}: {count} images, where published metrics have {enough:,} or more; {fix}."
        if count < enough and note not in self.notes:
            self.notes.append(note)
            warnings.warn(note, SmallSampleWarning, stacklevel=3)

    def result(self) -> dict[str, Any]:
        """``metrics``, ``intervals``, ``recipes`` and ``notes``, ready for JSON."""
        intervals = {name: list(interval) for name, interval in self.intervals.items()}
        return {"figures": self.figures, "intervals": intervals, "recipes": self.recipes, "notes": self.notes}


def compare_measures(first: Measures, second: Measures) -> list[dict[str, Any]]:
    """Differences of the metrics that two systems have in common, on the same prompts and seeds.

    Returns:
        A dict for each metric that is not about given images alone: ``metric`` (its name), ``label``, ``first``,
        ``second``, ``difference`` (second less first) and ``interval``, 95 % of the difference in pairs, or None for
        metrics without one. Prompts are sampled alike for both, so that hard and easy ones cancel; the interval is often
        far narrower than either metric's.

    Raises:
        ValueError: if prompts, numbers of images, seeds or recipes (extractor, N, reference) differ.
    """
    if list(first.prompts) != list(second.prompts) or (first.seed, first.resamples) != (second.seed, second.resamples):
        raise ValueError("first, second: prompts, seed or resamples differ; compare metrics of the same run only.")
    out = []
    for name, recipe in first.recipes.items():
        if name not in second.recipes or name.endswith(("_real", "_real_halves", "_real_other", "_training")):
            continue  # those say nothing about a system
        if recipe != second.recipes[name]:
            raise ValueError(f"{name}: the recipes differ, {recipe} and {second.recipes[name]}; they do not compare.")
        difference = second.figures[name] - first.figures[name]
        interval: Interval | None = None
        if name in first.rows and len(set(first.rows[name][1])) > 1:
            (values, groups), (others, _) = first.rows[name], second.rows[name]
            interval = bootstrap_interval(others - values, groups, seed=first.seed)
        elif name in first.draws:
            interval = interval_around(difference, second.draws[name] - first.draws[name])
        out.append({"figure": name, "label": recipe["label"], "first": first.figures[name],
                    "second": second.figures[name], "difference": difference, "interval": interval})  # fmt: skip
    return out
