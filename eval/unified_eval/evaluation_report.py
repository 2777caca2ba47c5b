"""The pages of an evaluation and of a comparison: metrics, floors and ceilings, best and worst, nearest neighbours."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from unified_eval.evaluate import recipe_line
from unified_eval.intervals import Interval
from unified_eval.report import Figure, Picture, format_value, write_report
from unified_eval.sheets import captioned_grid, in_rows

# Suffixes of a metric's floors and ceilings, and what they are called.
BOUNDS = {
    "_shuffled": "other captions (floor)",
    "_real_halves": "half of real to the other half",
    "_real_other": "other real images",
    "_reconstructions": "through the tokenizer",
    "_training": "training images",
    "_real": "real images",
}


class Drawn(NamedTuple):
    """The images of an evaluation, in the order of their captions.

    ``generated`` holds ``len(generated) / len(captions)`` images for each caption, with the seeds ``seed + i``.
    ``neighbours`` is the nearest training image of each generated one with its caption and distance, if known.
    """

    captions: Sequence[str]
    real: Sequence[Image.Image]
    reconstructed: Sequence[Image.Image]
    generated: Sequence[Image.Image]
    seed: int
    neighbours: Sequence[tuple[Image.Image, str, float]] = ()


def shown(value: float, interval: Interval | Sequence[float] | None) -> str:
    """A number with its interval: ``12.34 [11.20, 13.48]``."""
    text = format_value(float(value))
    return text if interval is None else f"{text} [{format_value(interval[0])}, {format_value(interval[1])}]"


def floors_and_ceilings(figures: Mapping[str, float]) -> list[dict[str, object]]:
    """Rows that put each metric of generated images beside the same metric of what it lies between."""
    # R@1 alone names generated images; its other floor is chance.
    plain = {name.replace("r1_generated", "r1"): value for name, value in figures.items()}
    out: list[dict[str, object]] = []
    for name, value in plain.items():
        bounds = {title: plain.get(name + suffix) for suffix, title in BOUNDS.items()}
        if any(bound is not None for bound in bounds.values()):
            cells = {title: "" if bound is None else format_value(bound) for title, bound in bounds.items()}
            out.append({"figure": name, "generated": format_value(value), **cells})
    return out


def sample_sheet(drawn: Drawn, numbers: Sequence[int] | None = None, notes: Sequence[str] | None = None) -> Image.Image:
    """A grid of generated images, each with its caption, its seed and possibly a note."""
    each = len(drawn.generated) // len(drawn.captions)
    numbers = range(len(drawn.generated)) if numbers is None else numbers
    texts = [f"{drawn.captions[number // each]} (seed {drawn.seed + number})" for number in numbers]
    if notes is not None:
        texts = [f"{note}: {text}" for note, text in zip(notes, texts, strict=True)]
    return captioned_grid(in_rows([drawn.generated[number] for number in numbers], 8), in_rows(texts, 8))


def comparison_sheet(drawn: Drawn, rows: int = 12) -> Image.Image:
    """Real, through the tokenizer, generated: one row for each of the first captions."""
    each = len(drawn.generated) // len(drawn.captions)
    sets = zip(drawn.real, drawn.reconstructed, drawn.generated[::each], strict=True)
    images = [list(row) for row in sets][:rows]
    titles = ["real", "reconstruction", "generated"]
    return captioned_grid(images, column_titles=titles, row_titles=list(drawn.captions)[:rows])


def neighbour_sheet(drawn: Drawn, rows: int = 8) -> Image.Image:
    """The generated images that are nearest to a training image, beside it."""
    order = sorted(range(len(drawn.neighbours)), key=lambda number: drawn.neighbours[number][2])[:rows]
    each = len(drawn.generated) // len(drawn.captions)
    images = [[drawn.generated[number], drawn.neighbours[number][0]] for number in order]
    texts = [[drawn.captions[number // each], f"{drawn.neighbours[number][1]} ({drawn.neighbours[number][2]:.3f})"]
             for number in order]  # fmt: skip
    return captioned_grid(images, texts, column_titles=["generated", "nearest training image"])


def write_evaluation_report(
    out: Path, title: str, result: Mapping[str, Any], drawn: Drawn, scores: np.ndarray | None, command: str
) -> Path:
    """Write the page of one evaluation.

    Args:
        out: HTML file to write.
        title: headline.
        result: ``metrics``, ``intervals``, ``recipes``, ``notes`` and ``run``.
        generated: the images.
        scores: a score of every generated image, by which the best and the worst are shown; None for no such sheet.
        command: what was run.
    """
    figures, intervals, recipes = result["figures"], result["intervals"], result["recipes"]
    count = len(drawn.generated)
    images = [
        Picture(sample_sheet(drawn), f"Every generated image ({count}), with caption and seed; none was selected.")
    ]
    if scores is not None:
        order = np.argsort(-scores, kind="stable")
        most = min(8, count // 2)
        for numbers, word in ((order[:most], "Best"), (order[-most:][::-1], "Worst")):
            notes = [format_value(float(scores[number])) for number in numbers]
            sheet = sample_sheet(drawn, numbers.tolist(), notes)
            images.append(Picture(sheet, f"{word} {most} by score, with the score of each."))
    images.append(
        Picture(comparison_sheet(drawn), "Real images, what the image tokenizer makes of them, generated ones.")
    )
    if drawn.neighbours:
        text = (
            "The generated images nearest to a training image (shown through the tokenizer), and the cosine distance."
        )
        images.append(Picture(neighbour_sheet(drawn), text))
    bounds = floors_and_ceilings(figures)
    run = [{"setting": name, "value": str(value)} for name, value in result["run"].items()
           if name not in ("captions", "rows", "include")]  # fmt: skip
    return write_report(
        out,
        title,
        figures=[Figure(recipes[name]["label"], shown(value, intervals.get(name)), recipe_line(recipes[name]))
                 for name, value in figures.items()],
        tables={**({"Floors and ceilings": bounds} if bounds else {}), "Run": run},
        images=images,
        commands=[command],
        notes=["In brackets: 95 % intervals over prompts.", *result["notes"]],
    )  # fmt: skip


def write_comparison_report(
    out: Path, names: Sequence[str], differences: Sequence[Mapping[str, Any]], drawn: Sequence[Drawn],
    notes: Sequence[str], command: str,
) -> Path:  # fmt: skip
    """Write the page of two systems on the same prompts and seeds: differences in pairs, images side by side."""
    rows = [
        {"figure": row["label"], names[0]: format_value(row["first"]), names[1]: format_value(row["second"]),
         "difference": shown(row["difference"], row["interval"]), "verdict": verdict(row["interval"])}
        for row in differences
    ]  # fmt: skip
    each = len(drawn[0].generated) // len(drawn[0].captions)
    sides = [[first, second] for first, second in zip(drawn[0].generated, drawn[1].generated, strict=True)][::each][:24]
    sheet = captioned_grid(sides, column_titles=list(names), row_titles=list(drawn[0].captions)[: len(sides)])
    return write_report(
        out,
        f"{names[1]} against {names[0]}",
        tables={"Differences in pairs": rows},
        images=[Picture(sheet, "The same captions and seeds.")],
        commands=[command],
        notes=[f"Differences are {names[1]} less {names[0]}, on the same prompts and seeds at equal N. In brackets: 95 % "
               "intervals in pairs over prompts.", *notes],
    )  # fmt: skip


def verdict(interval: Interval | None) -> str:
    """What a 95 % interval of a difference says: ``higher``, ``lower`` or ``not told apart``."""
    if interval is None:
        return "no interval"
    return "higher" if interval[0] > 0 else "lower" if interval[1] < 0 else "not told apart"
