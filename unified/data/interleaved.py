"""Interleaved rows, lists of texts and images in any order: read, encode once, and lay out as sequences."""

import reprlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from accelerate import PartialState
from PIL import Image

from unified.config import Vocabulary
from unified.data.captioned import grids_of
from unified.data.code_cache import Prepared, first_rows, source_split, write_cache
from unified.data.crops import Size, fit, nearest_aspect
from unified.data.encoding import Features, Numbered
from unified.data.rows import Rows, SkipReport, check_column, open_rgb, readable
from unified.data.sources import load_source
from unified.prediction.frame import Frame
from unified.sequence import ImageSegment, Segment, TextSegment, TokenSequence, build_sequence
from unified_tokenizers import TextTokenizer
from unified_tokenizers.base import ImageTokenizer
from unified_tokenizers.images import to_tensor

SEGMENT_COLUMNS = datasets.Features(
    {
        "texts": datasets.List(datasets.Value("string")),  # one entry per segment, null for an image
        "codes": datasets.List(datasets.Value("int32")),  # of all images, one after the other
        "heights": datasets.List(datasets.Value("int32")),
        "widths": datasets.List(datasets.Value("int32")),
        "source_row": datasets.Value("int64"),
        "view": datasets.Value("int32"),
    }
)


def encode_interleaved(
    tokenizer: ImageTokenizer,
    source: str,
    out: str | Path,
    splits: tuple[str, ...] = ("train", "validation"),
    sizes: Sequence[Size] = ((64, 64),),
    segments_column: str = "segments",
    batch_size: int = 64,
    streaming: bool = False,
    block_rows: int = 256,
    process: PartialState | None = None,
    storage_options: dict[str, Any] | None = None,
    max_rows: int | None = None,
    validation: float | None = None,
) -> dict[str, SkipReport]:
    """Encode the images of interleaved rows and write an Arrow data set of texts, codes and grids.

    A row of the source holds a list of segments ``{"text": ..., "image": ...}``, one of the two null. Blank texts are left
    out; a row with a broken image, or with nothing in it, is skipped and reported.

    Args:
        tokenizer, source, out, splits, batch_size, streaming, block_rows, process, storage_options, max_rows, validation: as
            in :func:`unified.data.code_cache.encode_source`.
        sizes: sizes ``(height, width)``; an image is fitted to the one with the most similar aspect ratio.
        segments_column: column with the lists.

    Raises:
        ValueError: as :func:`unified.data.code_cache.encode_source`, or if the column holds something else.
    """
    settings = {
        "kind": "interleaved", "source": source, "sizes": [list(size) for size in sizes], "block_rows": block_rows,
        "columns": [segments_column], "max_rows": max_rows, "validation": validation,
    }  # fmt: skip

    def make(numbered: Numbered, report: SkipReport) -> list[dict[str, Any]]:
        return segment_records(tokenizer, numbered, report, sizes, segments_column, batch_size)

    def load(split: str) -> Rows:
        rows = load_source(source, source_split(split, validation), streaming, storage_options, segments_column)
        return first_rows(rows, max_rows)

    def prepare(rows: Rows) -> Prepared:
        return _undecoded(rows, segments_column), make, SEGMENT_COLUMNS

    return write_cache(tokenizer, out, splits, sizes, settings, load, prepare, block_rows, batch_size, process)


def interleaved_sequence(
    row: dict[str, Any],
    rng: np.random.Generator | None,
    text_tokenizer: TextTokenizer,
    vocabulary: Vocabulary,
    max_length: int,
    frame: Frame | None = None,
) -> TokenSequence:
    """A row of the cache as one sequence of at most ``max_length`` tokens, all of it in the loss; nothing is random.

    Texts are cut where the room ends, images are kept whole or left out with all that follows. ``<eos>`` is there if
    nothing was cut. ``frame`` is that of the model's images, whose tokens count.

    Raises:
        ValueError: if not even the first image fits, or codes and grids are not those of a cache.
    """
    room = max_length - (vocabulary.bos_token_id is not None)
    segments: list[Segment] = []
    images = iter(grids_of(row["codes"], row["heights"], row["widths"]))
    if not row["texts"]:
        raise ValueError(f"texts: {row['texts']} in a row of the cache; encode the source again.")
    if sum(text is None for text in row["texts"]) != len(row["heights"]):
        raise ValueError(
            f"texts: {sum(text is None for text in row['texts'])} places of images for {len(row['heights'])} grids; encode "
            "the source again."
        )
    for text in row["texts"]:
        segment = TextSegment(text_tokenizer.encode(str(text))) if text is not None else ImageSegment(next(images))
        if isinstance(segment, TextSegment):
            size = len(segment.ids)
        else:
            height, width = segment.codes.shape
            size = (height * width if frame is None else len(frame.tokens((height, width)))) + 2
        if size > room:
            if isinstance(segment, TextSegment):
                segments.append(TextSegment(segment.ids[:room]))
            room = 0
            break
        segments.append(segment)
        room -= size
    if not segments:
        raise ValueError(f"max_length: {max_length} has no room for the first image of a row; raise it.")
    return build_sequence(segments, vocabulary, end=room > 0)


def _undecoded(rows: Rows, column: str) -> Rows:
    check_column(rows, "segments_column", column)
    if rows.features is None:
        return rows  # a stream that finds its columns out as it goes, and decodes nothing
    inner = getattr(rows.features[column], "feature", None)
    if not isinstance(inner, dict) or set(inner) != {"text", "image"}:
        raise ValueError(
            f"segments_column: {column!r} must hold lists of {{text, image}}, it holds {rows.features[column]}."
        )
    segment = {"text": datasets.Value("string"), "image": datasets.Image(decode=False)}
    try:
        return rows.cast_column(column, datasets.List(segment))
    except (TypeError, ValueError) as error:
        raise ValueError(f"segments_column: {column!r} must hold lists of {{text, image}} ({error}).") from error


def segment_records(
    tokenizer: ImageTokenizer,
    rows: Numbered,
    report: SkipReport,
    sizes: Sequence[Size],
    column: str,
    batch_size: int,
    vision: Features | None = None,
) -> list[dict[str, Any]]:
    """Records of a block; images of one size are encoded together, whatever row they are from.

    With ``vision`` also features, of the images whose segments say ``read``.
    """
    records: list[tuple[int, list[str | None], list[np.ndarray], dict[int, np.ndarray]]] = []
    waiting: dict[Size, list[tuple[Image.Image, list[np.ndarray], int, dict[int, np.ndarray]]]] = defaultdict(list)

    def encode(size: Size) -> None:
        batch = waiting.pop(size)
        pixels = to_tensor([view for view, *_ in batch])
        codes = tokenizer.encode(pixels).cpu().numpy().astype(np.int32)
        for grid, (_, places, place, _) in zip(codes, batch, strict=True):
            places[place] = grid
        wanted = [number for number, (*_, place, seen) in enumerate(batch) if place in seen]
        if vision is not None and wanted:
            for number, features in zip(wanted, vision(pixels[wanted]).cpu().numpy(), strict=True):
                *_, place, seen = batch[number]
                seen[place] = features.flatten()

    for number, row in rows:
        if not readable(row, report, number):
            continue
        segments = row[column] or ()
        if not isinstance(segments, list | tuple) or not all(_is_segment(segment) for segment in segments):
            report.skip("unreadable_row", number, f"{column} is no list of texts and images: {reprlib.repr(segments)}")
            continue
        damaged = [s["text"] for s in segments if "\N{REPLACEMENT CHARACTER}" in (s.get("text") or "")]
        if damaged:
            report.skip("unreadable_caption", number, f"{damaged[0]!r:.60} was not UTF-8")
            continue
        try:
            texts, views = _read(segments, sizes)
        except ValueError as error:
            report.skip("corrupt_image", number, str(error))
            continue
        if not texts:
            report.skip("empty_caption", number, "no text and no image")
            continue
        report.used += 1
        grids = [np.empty((0, 0), np.int32) for _ in views]
        images = [segment for segment in segments if segment.get("image") is not None]
        seen = {place: np.empty(0, np.float16) for place, each in enumerate(images) if each.get("read")}
        records.append((number, texts, grids, seen))
        for place, (size, view) in enumerate(views):
            waiting[size].append((view, grids, place, seen))
            if len(waiting[size]) == batch_size:
                encode(size)
    for size in list(waiting):
        encode(size)
    return [
        {
            "texts": texts,
            "codes": np.concatenate([np.empty(0, np.int32), *(grid.flatten() for grid in grids)]),
            "heights": [grid.shape[0] for grid in grids],
            "widths": [grid.shape[1] for grid in grids],
            "source_row": number,
            "view": 0,
            **({} if vision is None else {"features": np.concatenate([np.empty(0, np.float16), *seen.values()])}),
        }
        for number, texts, grids, seen in records
    ]


def _read(
    segments: Sequence[dict[str, Any]], sizes: Sequence[Size]
) -> tuple[list[str | None], list[tuple[Size, Image.Image]]]:
    """Texts, None in the places of images, and the images fitted to their sizes."""
    texts: list[str | None] = []
    views = []
    for segment in segments:
        text = segment.get("text")
        if segment.get("image") is not None:
            if text is not None:
                raise ValueError("a segment holds both a text and an image")
            image = open_rgb(segment["image"])
            size = nearest_aspect(image, sizes)
            views.append((size, fit(image, size)))
            texts.append(None)
        elif text is not None and text.strip():
            texts.append(text.lstrip("\ufeff"))
    return texts, views


def _is_segment(value: Any) -> bool:
    """Whether a value is a segment; a stream that does not know its columns may hold anything."""
    return isinstance(value, dict) and isinstance(value.get("text"), str | None)
