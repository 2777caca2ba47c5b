"""Pairs of images for one caption, of which one is preferred: encoded once, and as sequences."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState

from unified.config import Vocabulary
from unified.data.captioned import grids_of
from unified.data.code_cache import Prepared, first_rows, write_cache
from unified.data.crops import Size
from unified.data.encoding import Numbered
from unified.data.interleaved import SEGMENT_COLUMNS, segment_records
from unified.data.rows import Rows, SkipReport, class_names, readable, undecoded_rows, usable_caption
from unified.data.sources import load_source
from unified.data.tables import images_beside
from unified.sequence import ImageSegment, TextSegment, TokenSequence, build_sequence
from unified_tokenizers import TextTokenizer
from unified_tokenizers.base import ImageTokenizer


def encode_pairs(
    tokenizer: ImageTokenizer,
    source: str,
    out: str | Path,
    splits: tuple[str, ...] = ("train",),
    size: Size = (64, 64),
    columns: tuple[str, str, str] = ("chosen", "rejected", "caption"),
    batch_size: int = 64,
    block_rows: int = 256,
    process: PartialState | None = None,
    storage_options: dict[str, Any] | None = None,
    max_rows: int | None = None,
) -> dict[str, SkipReport]:
    """Encode both images of every row of a source; a row without a caption, or with a broken image, is skipped and reported.

    Args:
        tokenizer, source, out, splits, batch_size, block_rows, process, storage_options, max_rows: as in
            :func:`unified.data.code_cache.encode_source`.
        size: height and width in pixels that images are fitted to.
        columns: with the preferred images, with the others, and with the captions. In tables, paths start from the table's folder.

    Raises:
        ValueError: as :func:`unified.data.code_cache.encode_source`, or if two columns are one.
    """
    chosen, rejected, caption = columns
    if len(set(columns)) < 3:
        raise ValueError(f"chosen_column, rejected_column, caption_column: {list(columns)} must be three columns.")
    settings = {
        "kind": "pairs", "source": source, "sizes": [list(size)], "block_rows": block_rows, "columns": list(columns),
        "max_rows": max_rows,
    }  # fmt: skip

    def load(split: str) -> Rows:
        rows = first_rows(load_source(source, split, False, storage_options, chosen), max_rows)
        folder = (
            source if Path(source).is_dir() else source.rpartition("/")[0] if "://" in source else Path(source).parent
        )
        return images_beside(rows, rejected, str(folder) if "://" in source else str(Path(folder).absolute()))

    def prepare(rows: Rows) -> Prepared:
        rows = undecoded_rows(undecoded_rows(rows, chosen, caption), rejected, None)
        names = class_names(rows, caption)

        def make(numbered: Numbered, report: SkipReport) -> list[dict[str, Any]]:
            segments = _segments(numbered, report, columns, names)
            return segment_records(tokenizer, segments, report, [size], "segments", batch_size)

        return rows, make, SEGMENT_COLUMNS

    return write_cache(tokenizer, out, splits, [size], settings, load, prepare, block_rows, batch_size, process)


def pair_sequence(
    row: dict[str, Any], rng: np.random.Generator | None, text_tokenizer: TextTokenizer, vocabulary: Vocabulary
) -> TokenSequence:
    """``<bos> caption <boi> codes <eoi>`` of the preferred image, and as its ``rejected`` that of the other one.

    Raises:
        ValueError: if the row is none of :func:`encode_pairs`.
    """
    images, texts = grids_of(row["codes"], row["heights"], row["widths"]), row["texts"]
    if len(images) != 2 or len(texts) != 3 or texts[1:] != [None, None]:
        raise ValueError(f"codes: {len(images)} images and the texts {texts} are no pair; encode the source again.")
    caption = text_tokenizer.encode(str(texts[0]))
    chosen, rejected = (
        build_sequence([TextSegment(caption, loss=False), ImageSegment(image)], vocabulary) for image in images
    )
    chosen.rejected = rejected
    return chosen


def _segments(
    rows: Numbered, report: SkipReport, columns: tuple[str, str, str], names: list[str] | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows as lists of a caption and two images, as interleaved data have them."""
    chosen, rejected, column = columns
    for number, row in rows:
        if not readable(row, report, number):
            continue
        caption = usable_caption(row[column], names, report, number, "")
        missing = [name for name in (chosen, rejected) if row[name] is None]
        if missing:
            report.skip("corrupt_image", number, f"{missing[0]}: there is no image")
        elif caption is not None:
            texts = [{"text": caption, "image": None}]
            yield number, {"segments": texts + [{"text": None, "image": row[name]} for name in (chosen, rejected)]}
