"""The results of an evaluation: values with intervals and recipes, and the differences of two systems in pairs."""

import json
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unified.files import write_text
from unified_eval.intervals import Interval, bootstrap_interval, interval_around, resample, share_interval

VALUES = "values.json"  # in the folder of an evaluation: what Results.save writes


class SmallSampleWarning(UserWarning):
    """A metric of so few images that it says more about their number than about them."""


class Bound(NamedTuple):
    """A floor or a ceiling: the name of the value that reports put it beside, and its title there."""

    of: str
    title: str


@dataclass
class Value:
    """One number, its explanation, and the data by which two systems compare.

    Attributes:
        number: the number.
        recipe: everything that decides the number, with ``label``, the name to print.
        given: the number is about images that are given (real ones), not about the system: it is not compared.
        bound: the value that this one is a floor or a ceiling of.
        interval: the 95 % interval, if there is one.
        rows: for a mean, the value of every image and its prompt: these compare in pairs.
        resampled: for a distance, its values on resampled prompts: these compare in pairs of equal resamples.
    """

    number: float
    recipe: dict[str, Any]
    given: bool = False
    bound: Bound | None = None
    interval: Interval | None = None
    rows: tuple[np.ndarray, list[Hashable]] | None = None
    resampled: np.ndarray | None = None


@dataclass
class Results:
    """Values by name; a metric adds its own by :meth:`add`, :meth:`add_mean` or :meth:`add_distance`.

    Attributes:
        prompts: N prompts, all different; an interval resamples these, never single images.
        resamples: how often a distance is computed again on resampled prompts; 0 for distances without intervals.
        seed: seed of the resampling. Two results of one seed can be compared in pairs.
        values: the values by name, in the order in which they were added.
        notes: warnings for the reader, such as metrics of too few images.
    """

    prompts: Sequence[str]
    resamples: int = 200
    seed: int = 0
    values: dict[str, Value] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def metrics(self) -> dict[str, float]:
        """Numbers by name."""
        return {name: value.number for name, value in self.values.items()}

    @property
    def intervals(self) -> dict[str, Interval]:
        """95 % intervals by name, of the values that have one."""
        return {name: value.interval for name, value in self.values.items() if value.interval is not None}

    @property
    def recipes(self) -> dict[str, dict[str, Any]]:
        """Recipes by name."""
        return {name: value.recipe for name, value in self.values.items()}

    def add(
        self, name: str, number: float, label: str, *, given: bool = False, bound: Bound | None = None, **recipe: Any
    ) -> Value:
        """Add a number without interval; two systems compare by its difference.

        Args:
            name: key of the value.
            number: the number.
            label: name to print.
            given: see :class:`Value`.
            bound: see :class:`Value`.
            recipe: everything that decides the number.
        """
        self.values[name] = Value(float(number), {"label": label, **recipe}, given, bound)
        return self.values[name]

    def add_mean(
        self, name: str, values: np.ndarray, label: str, groups: Sequence[Hashable] | None = None, **settings: Any
    ) -> None:
        """Add the mean of a value of every image; two systems compare in pairs of images.

        Args:
            name: key of the value.
            values: ``(N,)``, one for each image.
            label: name to print.
            groups: the prompt of each image; without it, image i is that of prompt i.
            settings: as for :meth:`add`.
        """
        groups = list(self.prompts if groups is None else groups)
        value = self.add(name, float(values.mean()), label, n=len(values), **settings)
        value.rows = (values, groups)
        if np.isin(values, (0, 1)).all():
            value.interval = share_interval(values, groups, self.seed)
        elif len(set(groups)) > 1:
            value.interval = bootstrap_interval(values, groups, seed=self.seed)

    def add_distance(
        self,
        name: str,
        distance: Callable[[np.ndarray, np.ndarray], float],
        a: np.ndarray,
        b: np.ndarray,
        label: str,
        **settings: Any,
    ) -> None:
        """Add a distance; two systems compare in pairs of equal resamples of the prompts.

        Args:
            name: key of the value.
            distance: maps two sets of features to a number.
            a, b: features with a row for each prompt, in the order of the prompts.
            label: name to print.
            settings: as for :meth:`add`.
        """
        value = self.add(name, distance(a, b), label, n=len(a), n_reference=len(b), **settings)
        if self.resamples:
            samples = resample(range(len(self.prompts)), self.resamples, self.seed)
            value.resampled = np.array([distance(a[rows], b[rows]) for rows in samples])
            value.interval = interval_around(value.number, value.resampled)

    def note(self, text: str) -> None:
        """Keep a note, once."""
        if text not in self.notes:
            self.notes.append(text)

    def note_if_few(self, what: str, count: int, enough: int, fix: str) -> None:
        """Warn, and keep a note, if ``count`` images are fewer than published values of this kind have."""
        note = f"{what}: {count} images, where published metrics have {enough:,} or more; {fix}."
        if count < enough and note not in self.notes:
            self.note(note)
            warnings.warn(note, SmallSampleWarning, stacklevel=3)

    def result(self) -> dict[str, Any]:
        """``metrics``, ``intervals``, ``recipes`` and ``notes``, ready for JSON."""
        intervals = {name: list(interval) for name, interval in self.intervals.items()}
        return {"metrics": self.metrics, "intervals": intervals, "recipes": self.recipes, "notes": self.notes}

    def save(self, path: Path) -> None:
        """Write all that :func:`compare_results` needs as JSON."""
        values = {}
        for name, value in self.values.items():
            rows = None if value.rows is None else [value.rows[0].tolist(), value.rows[1]]
            resampled = None if value.resampled is None else value.resampled.tolist()
            values[name] = {"number": value.number, "recipe": value.recipe, "given": value.given, "rows": rows,
                            "resampled": resampled}  # fmt: skip
        content = {"prompts": list(self.prompts), "resamples": self.resamples, "seed": self.seed, "values": values}
        write_text(path, json.dumps(content, ensure_ascii=False, allow_nan=False))

    @classmethod
    def load(cls, path: Path) -> "Results":
        """Read what :meth:`save` wrote, for :func:`compare_results`; intervals, bounds and notes are not kept.

        Raises:
            ValueError: if the file is not there, or is none of these.
        """
        if not path.is_file():
            raise ValueError(f"results: {str(path)!r} does not exist; evaluate the pipeline first.")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            results = cls(content["prompts"], content["resamples"], content["seed"])
            for name, value in content["values"].items():
                rows = value["rows"] and (np.array(value["rows"][0]), list(value["rows"][1]))
                resampled = None if value["resampled"] is None else np.array(value["resampled"])
                results.values[name] = Value(
                    float(value["number"]), value["recipe"], value["given"], rows=rows, resampled=resampled
                )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"results: {str(path)!r} is no file of results ({error!r}); evaluate again.") from error
        return results


def compare_results(first: Results, second: Results) -> list[dict[str, Any]]:
    """Differences of the values that two systems have in common, on the same prompts and seeds.

    Returns:
        A dict for each value that is not about given images: ``metric`` (its name), ``label``, ``first``, ``second``,
        ``difference`` (second less first) and ``interval``, 95 % of the difference in pairs, or None where there is
        none. Prompts are resampled alike for both, so that hard and easy ones cancel; the interval is often far narrower
        than that of either value.

    Raises:
        ValueError: if prompts, numbers of images, seeds or recipes (extractor, N, reference) differ.
    """
    if list(first.prompts) != list(second.prompts) or (first.seed, first.resamples) != (second.seed, second.resamples):
        raise ValueError("first, second: prompts, seed or resamples differ; compare metrics of the same run only.")
    out = []
    for name, a in first.values.items():
        b = second.values.get(name)
        if b is None or a.given:
            continue
        if a.recipe != b.recipe:
            raise ValueError(f"{name}: the recipes differ, {a.recipe} and {b.recipe}; they do not compare.")
        out.append(
            {"metric": name, "label": a.recipe["label"], "first": a.number, "second": b.number,
             "difference": b.number - a.number, "interval": _interval_of_difference(a, b, first.seed)}
        )  # fmt: skip
    return out


def _interval_of_difference(a: Value, b: Value, seed: int) -> Interval | None:
    if a.rows is not None and b.rows is not None and len(set(a.rows[1])) > 1:
        return bootstrap_interval(b.rows[0] - a.rows[0], a.rows[1], seed=seed)
    if a.resampled is not None and b.resampled is not None:
        return interval_around(b.number - a.number, b.resampled - a.resampled)
    return None


def recipe_line(recipe: dict[str, Any]) -> str:
    """A recipe in one line, for tables and reports."""
    parts = [f"N={recipe['n']}"]
    for field_name in ("clip", "extractor"):
        if field_name in recipe:
            digest = recipe.get("weights_sha256") or recipe.get("clip_state_sha256", "")
            parts.append(f"{recipe[field_name]} (sha256 {digest[:12]})")
    parts += [str(recipe[name]) for name in ("formula", "kernel", "resize", "reference") if name in recipe]
    if "chance" in recipe:
        parts.append(f"chance {recipe['chance']:.3f}")
    if "seed" in recipe:
        parts.append(f"seed {recipe['seed']}")
    return "; ".join(parts)
