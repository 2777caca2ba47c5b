"""Which rows of a source are evaluated: chosen by their captions, decoded one at a time, never kept at full size."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Any, TypeVar

import datasets
from PIL import Image

from unified.data import CaptionedImage, SkipReport, captioned_images, load_source
from unified.data.rows import class_names, usable_caption
from unified_eval.clip import caption_key

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """A row of a source, by its caption and number; its image and other columns are read when asked for, and not kept.

    Attributes:
        caption: the caption.
        row: number of the row in its source.
    """

    caption: str
    row: int
    _source: datasets.Dataset = field(repr=False)
    _columns: tuple[str, str] = field(repr=False)

    @property
    def image(self) -> Image.Image:
        """The image, decoded again at every call. Raises ValueError if it is corrupt."""
        return self.read().image

    @property
    def extra(self) -> dict[str, Any]:
        """The columns beside image and caption. Raises ValueError if the image is corrupt."""
        return self.read().extra

    def read(self) -> CaptionedImage:
        """The whole row. Raises ValueError if its image is corrupt."""
        report = SkipReport()
        found = next(captioned_images(self._source.select([self.row]), report, *self._columns), None)
        if found is None:
            raise ValueError(f"row {self.row}: the image of {self.caption!r} is corrupt. {report.summary()}")
        return found

    def is_usable(self) -> bool:
        """Whether the image can be decoded."""
        try:
            self.read()
        except ValueError:
            return False
        return True


def first_usable_rows(
    source: str,
    split: str = "train",
    max_samples: int | None = None,
    image_column: str = "image",
    caption_column: str = "caption",
) -> tuple[list[Row], SkipReport]:
    """List the first ``max_samples`` rows of a split that have a caption, in order (all of them for None).

    No image but the first is decoded here, so that this is fast and needs little memory for any number of images. A
    corrupt image shows when its row is read: :func:`choose_usable` and :func:`usable_images` leave it out.

    Args:
        source: anything :func:`unified.data.sources.load_source` opens.
        split: name of the split.
        max_samples: how many rows to list; a shorter split gives what it has.
        image_column: column of the images.
        caption_column: column of the captions.

    Returns:
        The rows, and the report of the rows that were skipped before the last of them.

    Raises:
        ValueError: if ``max_samples`` is below 1, if no row is usable, or as ``load_source`` says.
    """
    columns = (image_column, caption_column)
    rows = _open(source, split, max_samples, columns)
    report, names = SkipReport(), class_names(rows, caption_column)
    kept: list[Row] = []
    for number, value in enumerate(rows[caption_column]):
        if len(kept) == max_samples:
            break
        caption = usable_caption(value, names, report, number, "")
        if caption is not None:
            kept.append(Row(caption, number, rows, columns))
            report.used += 1
    return kept, report


def usable_images(
    source: str,
    split: str = "train",
    max_samples: int | None = None,
    image_column: str = "image",
    caption_column: str = "caption",
    report: SkipReport | None = None,
) -> Iterator[CaptionedImage]:
    """Stream the first ``max_samples`` usable rows of a split with their images, one in memory at a time.

    Arguments and errors as for :func:`first_usable_rows`; ``report`` counts the rows that are left out.
    """
    columns = (image_column, caption_column)
    rows = _open(source, split, max_samples, columns)
    yield from islice(captioned_images(rows, SkipReport() if report is None else report, *columns), max_samples)


def _open(source: str, split: str, max_samples: int | None, columns: tuple[str, str]) -> datasets.Dataset:
    """Open a source that has a usable row."""
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples: {max_samples} is below 1; give a positive number or leave it out.")
    rows, report = load_source(source, split, image_column=columns[0]), SkipReport()
    assert isinstance(rows, datasets.Dataset)  # because it is not streamed
    if next(captioned_images(rows, report, *columns), None) is None:
        raise ValueError(f"source: split {split!r} of {source!r} has no usable row.\n{report.summary()}")
    return rows


def unique_captions(rows: Sequence[Row]) -> list[Row]:
    """Keep the first row of every caption, so that no image has two right captions."""
    seen: dict[str, Row] = {}
    for row in rows:
        seen.setdefault(caption_key(row.caption), row)
    return list(seen.values())


def choose_evenly(items: Sequence[T], count: int, seed: int) -> list[T]:
    """Cut ``items`` into ``count`` runs of nearly equal length and take one item of each, by seed; order is kept.

    Raises:
        ValueError: if ``count`` is below 1 or above the number of items.
    """
    return [run[0] for run in _runs(items, count, seed)]


def choose_usable(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """:func:`choose_evenly` of rows whose images can be decoded; no other image is decoded than those of the choice.

    In place of a corrupt image the next usable one of its run is taken. Errors as for :func:`choose_evenly`.
    """
    usable: dict[int, bool] = {}

    def is_usable(row: Row) -> bool:
        if row.row not in usable:
            usable[row.row] = row.is_usable()
        return usable[row.row]

    while True:
        chosen = [next(filter(is_usable, run), None) for run in _runs(rows, count, seed)]
        if None not in chosen:
            return [row for row in chosen if row is not None]
        rows = [row for row in rows if usable.get(row.row, True)]  # a whole run is corrupt: cut other runs


def _runs(items: Sequence[T], count: int, seed: int) -> Iterator[list[T]]:
    """The runs of :func:`choose_evenly`, each from the chosen item on and round to it."""
    if not 1 <= count <= len(items):
        raise ValueError(f"count: cannot choose {count} of {len(items)} items; give 1 to {len(items)}.")
    chance = random.Random(seed)
    edges = [index * len(items) // count for index in range(count + 1)]
    for low, high in pairwise(edges):
        first = chance.randrange(low, high)
        yield [*items[first:high], *items[low:first]]
