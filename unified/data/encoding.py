"""Encoding a source in blocks of rows: each block becomes one file, written whole or not at all.

Block b holds rows ``[b * R, (b + 1) * R)`` of a split and belongs to process ``b mod N``. What a block contains depends on
nothing but its rows, so a run that was killed goes on with the blocks that are missing, with any number of processes.
"""

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import datasets
import numpy as np
from datasets.arrow_writer import ArrowWriter
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from unified.data.crops import Views
from unified.data.rows import UNREADABLE, Rows, SkipReport, class_names, first_readable, usable_rows
from unified_tokenizers.base import ImageTokenizer
from unified_tokenizers.images import to_tensor

Numbered: TypeAlias = Iterable[tuple[int, dict[str, Any]]]
MakeRecords: TypeAlias = Callable[[Numbered, SkipReport], Iterable[dict[str, Any]]]
Viewed: TypeAlias = tuple[Image.Image, int, dict[str, Any]]  # an image, its row, what the records of its views share
VIEW_COLUMNS = {
    "codes": datasets.List(datasets.Value("int32")),
    "height": datasets.Value("int32"),
    "width": datasets.Value("int32"),
    "source_row": datasets.Value("int64"),
    "view": datasets.Value("int32"),
}
FEATURES = {"features": datasets.List(datasets.Value("float16"))}  # of the images that are read, one after the other


class Features(Protocol):
    """A frozen vision encoder, such as :class:`unified.model.vision.VisionEncoder`.

    Attributes:
        description: ``UnifiedConfig.vision``.
    """

    description: dict[str, Any]

    def __call__(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` in [-1, 1] to features ``(B, P, F)`` in float16."""


_COLUMNS = {**VIEW_COLUMNS, "caption": datasets.Value("string")}


def encode_blocks(
    rows: Rows,
    make: MakeRecords,
    features: datasets.Features,
    folder: Path,
    block_rows: int,
    process: int,
    processes: int,
    name: str,
) -> None:
    """Write the blocks of this process that ``folder`` does not have yet; ``make`` turns numbered rows into records."""
    folder.mkdir(parents=True, exist_ok=True)
    total = -(-len(rows) // block_rows) if isinstance(rows, datasets.Dataset) else None
    with tqdm(desc=f"encode {name}", unit="row", disable=process > 0) as bar:
        for block, numbered in _blocks(rows, block_rows, process, processes, folder):
            report = SkipReport()
            made = []
            for record in make(numbered, report):
                made.append(record)
                bar.update()
            bar.set_postfix(block=f"{block + 1}/{total or '?'}")
            _write(_file(folder, block), sorted(made, key=lambda r: (r["source_row"], r["view"])), features, report)


def captioned_records(
    tokenizer: ImageTokenizer,
    rows: Rows,
    views: Views,
    image_column: str,
    caption_column: str,
    batch_size: int,
    vision: Features | None = None,
) -> tuple[MakeRecords, datasets.Features]:
    """How rows of :func:`unified.data.rows.undecoded_rows` become records of views with captions, and their columns."""
    text, names = _text_columns(rows, image_column, caption_column), class_names(rows, caption_column)

    def make(numbered: Numbered, report: SkipReport) -> Iterator[dict[str, Any]]:
        usable = usable_rows(numbered, report, image_column, caption_column, names)
        images = (
            (row.image, row.row, {"caption": row.caption, **{name: row.extra.get(name) for name in text}})
            for row in usable
        )
        return encode_views(tokenizer, images, views, batch_size, vision)

    columns = _COLUMNS | feature_columns(vision) | {name: datasets.Value("string") for name in text}
    return make, datasets.Features(columns)


def feature_columns(vision: Features | None) -> dict[str, Any]:
    """The column of features, of a cache that has them."""
    return {} if vision is None else FEATURES


def read_blocks(folder: Path) -> tuple[datasets.Dataset, SkipReport]:
    """All blocks of a finished split in order, and what was skipped in them."""
    files = sorted(folder.glob("block-*.arrow"))
    total = SkipReport()
    for file in files:
        total.add(SkipReport(**json.loads(file.with_suffix(".json").read_text())))
    parts = [datasets.Dataset.from_file(str(file)) for file in files]
    if not parts:
        return datasets.Dataset.from_dict({}), total
    return datasets.concatenate_datasets([part for part in parts if len(part)] or parts[:1]), total


def _file(folder: Path, block: int) -> Path:
    return folder / f"block-{block:08d}.arrow"


def _blocks(rows: Rows, block_rows: int, process: int, processes: int, folder: Path) -> Iterator[tuple[int, Numbered]]:
    """Number and numbered rows of the blocks that this process still has to make."""
    if isinstance(rows, datasets.Dataset):
        for block in range(process, -(-len(rows) // block_rows), processes):
            if not _file(folder, block).exists():
                start = block * block_rows
                yield block, enumerate(rows.select(range(start, min(start + block_rows, len(rows)))), start)
        return
    stream = iter(enumerate(rows))
    for block in count():
        first = next(stream, None)
        if first is None:
            return
        numbered = chain([first], islice(stream, block_rows - 1))
        if block % processes == process and not _file(folder, block).exists():
            yield block, numbered
        for _ in numbered:  # undecoded, so passing over the rows of a block is cheap
            pass


def _text_columns(rows: Rows, image_column: str, caption_column: str) -> list[str]:
    """Further columns that hold text, such as ids and groups; the cache keeps them."""
    taken = {*_COLUMNS, *FEATURES, image_column, caption_column, UNREADABLE}
    if rows.features is not None:
        names = [name for name, kind in rows.features.items() if getattr(kind, "dtype", None) == "string"]
    else:
        names = [name for name, value in (first_readable(rows) or {}).items() if isinstance(value, str)]
    return [name for name in names if name not in taken]


def encode_views(
    tokenizer: ImageTokenizer,
    images: Iterable[Viewed],
    views: Views,
    batch_size: int,
    vision: Features | None = None,
) -> Iterator[dict[str, Any]]:
    """Records of all views of images, batched by size, so not in order; with features of each view for ``vision``."""
    waiting: dict[tuple[int, int], list[tuple[Image.Image, dict[str, Any]]]] = defaultdict(list)
    for image, row, shared in images:
        for number, view in enumerate(views(image, row)):
            waiting[view.size].append((view, {**shared, "source_row": row, "view": number}))
            if len(waiting[view.size]) == batch_size:
                yield from _encode_batch(tokenizer, waiting.pop(view.size), vision)
    for batch in waiting.values():
        yield from _encode_batch(tokenizer, batch, vision)


def _encode_batch(
    tokenizer: ImageTokenizer, batch: list[tuple[Image.Image, dict[str, Any]]], vision: Features | None
) -> Iterator[dict[str, Any]]:
    pixels = to_tensor([view for view, _ in batch])
    codes = tokenizer.encode(pixels).cpu().numpy().astype(np.int32)
    features = [None] * len(batch) if vision is None else vision(pixels).cpu().numpy()
    for grid, seen, (_, record) in zip(codes, features, batch, strict=True):
        more = {} if seen is None else {"features": seen.flatten()}
        yield {"codes": grid.flatten(), "height": grid.shape[0], "width": grid.shape[1], **more, **record}


def _write(file: Path, records: list[dict[str, Any]], features: datasets.Features, report: SkipReport) -> None:
    """Write beside, then rename: the file exists when it is whole."""
    partial = file.with_suffix(".partial")
    with ArrowWriter(path=str(partial), features=features) as writer:
        for record in records:
            writer.write(record)
        writer.finalize()
    file.with_suffix(".json").write_text(json.dumps(asdict(report)))
    os.replace(partial, file)
