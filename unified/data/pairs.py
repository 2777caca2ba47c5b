"""Pairs of images for one caption, of which one is preferred: encoded once or kept as they were sampled, and as sequences."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from accelerate import PartialState

from unified.config import Vocabulary
from unified.data.captioned import grids_of
from unified.data.code_cache import CACHE_FILE, Prepared, first_rows, write_cache
from unified.data.crops import Size
from unified.data.encoding import Numbered
from unified.data.interleaved import SEGMENT_COLUMNS, segment_records
from unified.data.rows import Rows, SkipReport, class_names, readable, undecoded_rows, usable_caption
from unified.data.sources import load_source
from unified.data.tables import images_beside
from unified.files import write_json
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


def save_pairs(
    tokenizer: ImageTokenizer, out: str | Path, pairs: Sequence[tuple[str, np.ndarray, np.ndarray]], source: str
) -> None:
    """Write pairs of generated images as a codes cache with the split ``train``.

    The codes are kept as the model sampled them: an image that is decoded and encoded again gets other codes, of which the model
    thinks as of somebody else's image.

    Args:
        tokenizer: the image tokenizer whose codes these are.
        out: folder to write; it must not exist.
        pairs: caption, codes ``(h, w)`` of the preferred image, and those of the other one.
        source: folder or Hub name of the pipeline that sampled them, for the model card.

    Raises:
        ValueError: if there is no pair.
        FileExistsError: if the folder exists.
    """
    if not pairs:
        raise ValueError("pairs: the list is empty.")
    records = [
        {
            "texts": [caption, None, None],
            "codes": np.concatenate([chosen.ravel(), rejected.ravel()]).astype(np.int32),
            "heights": [chosen.shape[0], rejected.shape[0]],
            "widths": [chosen.shape[1], rejected.shape[1]],
            "source_row": number,
            "view": 0,
        }
        for number, (caption, chosen, rejected) in enumerate(pairs)
    ]
    out = Path(out)
    out.mkdir(parents=True)
    rows = datasets.Dataset.from_list(records, features=SEGMENT_COLUMNS)
    datasets.DatasetDict({"train": rows}).save_to_disk(out)
    description = {
        "tokenizer_fingerprint": tokenizer.fingerprint, "codebook_size": tokenizer.codebook_size,
        "downsample": tokenizer.downsample, "kind": "pairs", "source": source,
        "rows": {"train": asdict(SkipReport(used=len(pairs)))},
    }  # fmt: skip
    write_json(out / CACHE_FILE, description)


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
