"""The pages of an evaluation and of a comparison: metrics, floors and ceilings, best and worst, nearest neighbours."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from unified_eval.inputs import Inputs
from unified_eval.intervals import Interval
from unified_eval.report import format_value, write_report
from unified_eval.results import Results, recipe_line
from unified_eval.sheets import captioned_grid, in_rows


class Neighbour(NamedTuple):
    """A generated image by its number, and the training image nearest to it with its caption and cosine distance."""

    number: int
    image: Image.Image
    caption: str
    distance: float


def shown(value: float, interval: Interval | Sequence[float] | None) -> str:
    """A number with its interval: ``12.34 [11.20, 13.48]``."""
    text = format_value(float(value))
    return text if interval is None else f"{text} [{format_value(interval[0])}, {format_value(interval[1])}]"


def print_results(results: Results) -> None:
    """Print values with their intervals and recipes, and the notes."""
    print(f"\n{'metric':<62} {'value [95 % interval]':>30}  recipe")
    for value in results.values.values():
        label, number = value.recipe["label"], shown(value.number, value.interval)
        print(f"{label:<62} {number:>30}  {recipe_line(value.recipe)}")
    for note in results.notes:
        print(f"note: {note}")


def print_differences(differences: Sequence[Mapping[str, Any]]) -> None:
    """Print what :func:`unified_eval.results.compare_results` returns."""
    print(f"\n{'metric':<62} {'A':>10} {'B':>10} {'B - A [95 % interval in pairs]':>32}")
    for row in differences:
        first, second = format_value(row["first"]), format_value(row["second"])
        change = shown(row["difference"], row["interval"])
        print(f"{row['label']:<62} {first:>10} {second:>10} {change:>32}  {verdict(row['interval'])}")


def verdict(interval: Interval | None) -> str:
    """The meaning of a 95 % interval of a difference: ``higher``, ``lower`` or ``not told apart``."""
    if interval is None:
        return "no interval"
    return "higher" if interval[0] > 0 else "lower" if interval[1] < 0 else "not told apart"


def floors_and_ceilings(results: Results) -> list[dict[str, object]]:
    """Rows that put each metric of generated images beside its floors and ceilings."""
    bounds: dict[str, dict[str, float]] = {}
    titles: dict[str, str] = {}
    for value in results.values.values():
        if value.bound is not None:
            bounds.setdefault(value.bound.of, {})[value.bound.title] = value.number
            titles[value.bound.title] = ""
    return [
        {"metric": name, "generated": format_value(number), **titles,
         **{title: format_value(bound) for title, bound in bounds[name].items()}}
        for name, number in results.metrics.items() if name in bounds
    ]  # fmt: skip


def by_score(inputs: Inputs, results: Results) -> list[tuple[int, float]]:
    """Numbers and CLIP scores of generated images, best first; without those whose captions the CLIP cannot read."""
    value = results.values.get("clip_score")
    if value is None or value.rows is None:
        return []
    scores, prompts = value.rows
    readable = set(prompts)
    numbers = [number for number, prompt in enumerate(inputs.prompts) if prompt in readable]
    return sorted(zip(numbers, scores.tolist(), strict=True), key=lambda pair: -pair[1])


def sample_sheet(
    inputs: Inputs, seed: int, numbers: Sequence[int] | None = None, notes: Sequence[str] | None = None
) -> Image.Image:
    """A grid of generated images, each with its caption, its seed and possibly a note."""
    numbers = range(len(inputs.generated)) if numbers is None else numbers
    texts = [f"{inputs.prompts[number]} (seed {seed + number})" for number in numbers]
    if notes is not None:
        texts = [f"{note}: {text}" for note, text in zip(notes, texts, strict=True)]
    return captioned_grid(in_rows([inputs.generated[number] for number in numbers], 8), in_rows(texts, 8))


def comparison_sheet(inputs: Inputs, rows: int = 12) -> Image.Image:
    """Real, through the tokenizer, generated: one row for each of the first captions."""
    sets = zip(inputs.real, inputs.reconstructed, inputs.generated[:: inputs.samples_per_caption], strict=True)
    images = [list(row) for row in sets][:rows]
    titles = ["real", "reconstruction", "generated"]
    return captioned_grid(images, column_titles=titles, row_titles=list(inputs.captions)[:rows])


def neighbour_sheet(inputs: Inputs, neighbours: Sequence[Neighbour]) -> Image.Image:
    """Generated images, each beside the training image nearest to it."""
    images = [[inputs.generated[found.number], found.image] for found in neighbours]
    texts = [[inputs.prompts[found.number], f"{found.caption} ({found.distance:.3f})"] for found in neighbours]
    return captioned_grid(images, texts, column_titles=["generated", "nearest training image"])


def write_evaluation_report(
    out: Path,
    title: str,
    inputs: Inputs,
    results: Results,
    run: Mapping[str, Any],
    neighbours: Sequence[Neighbour],
    command: str,
) -> Path:
    """Write the page of one evaluation.

    Args:
        out: HTML file to write.
        title: headline.
        inputs: the images.
        results: their metrics.
        run: the settings of the run, with ``seed``.
        neighbours: the generated images nearest to a training image; may be empty.
        command: the command of the run.
    """
    seed, count = run["seed"], len(inputs.generated)
    images = [
        (sample_sheet(inputs, seed), f"Every generated image ({count}), with caption and seed; none was selected.")
    ]
    ranked = by_score(inputs, results)
    most = min(8, len(ranked) // 2)
    for part, word in ((ranked[:most], "Best"), (ranked[::-1][:most], "Worst")):
        if part:
            sheet = sample_sheet(
                inputs, seed, [number for number, _ in part], [format_value(score) for _, score in part]
            )
            images.append((sheet, f"{word} {most} by score, with the score of each."))
    images.append(
        (comparison_sheet(inputs), "Real images, their reconstructions by the image tokenizer, generated ones.")
    )
    if neighbours:
        text = (
            "The generated images nearest to a training image (shown through the tokenizer), and the cosine distance."
        )
        images.append((neighbour_sheet(inputs, neighbours), text))
    bounds = floors_and_ceilings(results)
    settings = [
        {"setting": name, "value": str(value)} for name, value in run.items() if name not in ("captions", "rows")
    ]
    return write_report(
        out,
        title,
        metrics=[(value.recipe["label"], shown(value.number, value.interval), recipe_line(value.recipe))
                 for value in results.values.values()],
        tables={**({"Floors and ceilings": bounds} if bounds else {}), "Run": settings},
        images=images,
        commands=[command],
        notes=["In brackets: 95 % intervals over prompts.", *results.notes],
    )  # fmt: skip


def write_comparison_report(
    out: Path,
    names: Sequence[str],
    differences: Sequence[Mapping[str, Any]],
    inputs: Sequence[Inputs],
    notes: Sequence[str],
    command: str,
) -> Path:
    """Write the page of two systems on the same prompts and seeds: differences in pairs, and images side by side if there
    are ``inputs`` of both.
    """
    rows = [
        {"metric": row["label"], names[0]: format_value(row["first"]), names[1]: format_value(row["second"]),
         "difference": shown(row["difference"], row["interval"]), "verdict": verdict(row["interval"])}
        for row in differences
    ]  # fmt: skip
    images = []
    if inputs:
        first, second = inputs
        pairs = zip(first.generated, second.generated, strict=True)
        sides = [list(pair) for pair in pairs][:: first.samples_per_caption][:24]
        sheet = captioned_grid(sides, column_titles=list(names), row_titles=list(first.captions)[: len(sides)])
        images.append((sheet, "The same captions and seeds."))
    return write_report(
        out,
        f"{names[1]} against {names[0]}",
        tables={"Differences in pairs": rows},
        images=images,
        commands=[command],
        notes=[f"Differences are {names[1]} less {names[0]}, on the same prompts and seeds at equal N. In brackets: 95 % "
               "intervals in pairs over prompts.", *notes],
    )  # fmt: skip
