"""Which rows of a source are evaluated: the first usable ones, and an even, seeded choice among them."""

import random
from itertools import islice, pairwise
from typing import TypeVar

from unified.data.sources import CaptionedImage, SkipReport, captioned_images, load_source
from unified_eval.clip import caption_key

T = TypeVar("T")


def first_usable_rows(
    source: str,
    split: str = "train",
    max_samples: int | None = None,
    image_column: str = "image",
    caption_column: str = "caption",
) -> tuple[list[CaptionedImage], SkipReport]:
    """Read the first ``max_samples`` usable rows of a split, in order (all of them for None).

    Args:
        source: anything :func:`unified.data.sources.load_source` opens.
        split: name of the split.
        max_samples: how many rows to keep; a shorter split gives what it has.
        image_column: column of the images.
        caption_column: column of the captions.

    Returns:
        The rows, and the report of what was skipped before the last of them.

    Raises:
        ValueError: if ``max_samples`` is below 1, if no row is usable, or as ``load_source`` says.
    """
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples: {max_samples} is below 1; give a positive number or leave it out.")
    report = SkipReport()
    rows = captioned_images(load_source(source, split), report, image_column, caption_column)
    kept = list(islice(rows, max_samples))
    if not kept:
        raise ValueError(f"source: split {split!r} of {source!r} has no usable row.\n{report.summary()}")
    return kept, report


def unique_captions(rows: list[CaptionedImage]) -> list[CaptionedImage]:
    """Keep the first row of every caption, so that no image has two right captions."""
    seen: dict[str, CaptionedImage] = {}
    for row in rows:
        seen.setdefault(caption_key(row.caption), row)
    return list(seen.values())


def choose_evenly(items: list[T], count: int, seed: int) -> list[T]:
    """Cut ``items`` into ``count`` runs of nearly equal length and take one item of each, by seed; order is kept.

    Raises:
        ValueError: if ``count`` is below 1 or above the number of items.
    """
    if not 1 <= count <= len(items):
        raise ValueError(f"count: cannot choose {count} of {len(items)} items; give 1 to {len(items)}.")
    chance = random.Random(seed)
    edges = [index * len(items) // count for index in range(count + 1)]
    return [items[chance.randrange(low, high)] for low, high in pairwise(edges)]
