"""The codes cache: images encoded once, stored with the fingerprint of the tokenizer that made them."""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import PartialState
from torch import nn

from unified.data.content import content_of, was_streamed
from unified.data.crops import Size, Views
from unified.data.encoding import FEATURES, Features, MakeRecords, captioned_records, encode_blocks, read_blocks
from unified.data.held_out import part_names
from unified.data.rows import Rows, SkipReport, undecoded_rows, with_caption
from unified.data.sources import check_splits, load_source, terms_of
from unified.files import read_json, write_text
from unified.locks import LOCK_FILE, locked
from unified.settings import refuse_other
from unified_tokenizers.auto import AutoImageTokenizer
from unified_tokenizers.base import ImageTokenizer
from unified_tokenizers.fields import is_whole

CACHE_FILE = "codes.json"
Prepared = tuple[Rows, MakeRecords, datasets.Features]  # undecoded rows, how they become records, columns of these


def is_codes_cache(path: str | Path) -> bool:
    """Whether a folder was written by :func:`write_cache`."""
    return (Path(path) / CACHE_FILE).is_file()


def description_of(path: str | Path) -> dict[str, Any]:
    """What a cache says of itself. Raises ValueError if that cannot be read."""
    file = Path(path) / CACHE_FILE
    content = read_json(file, "codes")
    if "tokenizer_fingerprint" not in content:
        raise ValueError(f"codes: {str(file)!r} has no tokenizer_fingerprint; encode the images again.")
    return content


def encode_source(
    tokenizer: ImageTokenizer,
    source: str,
    out: str | Path,
    splits: tuple[str, ...] = ("train", "validation"),
    image_size: int = 64,
    image_column: str = "image",
    caption_column: str = "caption",
    batch_size: int = 64,
    streaming: bool = False,
    views: Views | None = None,
    block_rows: int = 1024,
    process: PartialState | None = None,
    caption: str | None = None,
    storage_options: dict[str, Any] | None = None,
    max_rows: int | None = None,
    validation: float | None = None,
    vision: Features | None = None,
) -> dict[str, SkipReport]:
    """Encode the images of a source and write an Arrow data set of codes, grids and captions.

    The folder appears only when it is complete. Until then ``<out>.partial`` collects blocks of rows; a run that was killed
    goes on from there, or starts again if the images or captions have changed. Rows that cannot be used are skipped and
    reported per split. Licence and attribution of the source (see :func:`unified.data.sources.terms_of`) and a digest of
    what it held (see :func:`unified.data.content.content_of`) are kept beside the codes.

    Args:
        tokenizer: any image tokenizer.
        source: any source of :func:`unified.data.sources.load_source`.
        out: folder to write; a finished cache in it is replaced.
        splits: splits to encode.
        image_size: side of the square views, without ``views``: resized on the shorter side, centre-cropped.
        image_column, caption_column: columns of the source; its further text columns (ids, groups) are kept.
        batch_size: images per encoder call.
        streaming: read rows as they come.
        views: sizes, crops and flips; every view becomes a row.
        block_rows: rows of the source that are encoded between two writes.
        process: this process's place among several, from Accelerate; without it there is one.
        caption: caption of all images, for a source that has none.
        storage_options: as in :func:`unified.data.sources.load_source`.
        max_rows: read only so many rows of every split; a stream is not read any further.
        validation: hold out this share of the split ``train``, chosen by content, as ``validation``.
        vision: also keep the features of a vision encoder, for a model that reads images by them.

    Returns:
        What was used and skipped, by split.

    Raises:
        ValueError: if a size does not divide by the tokenizer's stride, a split or column is missing, no row is left, the
            begun ``<out>.partial`` is of other settings, or another process writes to ``out``.
    """
    if max_rows is not None and not is_whole(max_rows):
        raise ValueError(f"max_rows: {max_rows} must be a whole number of at least 1; leave it out for all rows.")
    views = views or Views(((image_size, image_size),))
    settings = {
        "source": source,
        "image_size": image_size,
        "views": views.described(),
        "block_rows": block_rows,
        "columns": [image_column, caption_column],
        "caption": caption,
        "max_rows": max_rows,
        "validation": validation,
        "vision": vision_key(vision),
    }

    def load(split: str) -> Rows:
        return first_rows(
            load_source(source, source_split(split, validation), streaming, storage_options, image_column), max_rows
        )

    def prepare(rows: Rows) -> Prepared:
        if caption is not None:
            rows = with_caption(rows, caption, caption_column)
        rows = undecoded_rows(rows, image_column, caption_column)
        return rows, *captioned_records(tokenizer, rows, views, image_column, caption_column, batch_size, vision)

    return write_cache(tokenizer, out, splits, views.sizes, settings, load, prepare, block_rows, batch_size, process)


def vision_key(vision: Features | None) -> dict[str, Any] | None:
    """What the features of a cache depend on: the encoder's weights, the layer and the pooling."""
    return None if vision is None else {name: vision.description[name] for name in ("fingerprint", "layer", "pool")}


def source_split(split: str, validation: float | None) -> str:
    """What a split of a cache is called in the source, of whose ``train`` a share may be held out as ``validation``.

    Raises:
        ValueError: for another split than these two, if a share is given.
    """
    if validation is None:
        return split
    if split not in ("train", "validation"):
        raise ValueError(f"validation: a share of train; the split {split!r} has no part in it, leave it out.")
    return part_names("train", validation)[split == "validation"]


def write_cache(
    tokenizer: ImageTokenizer,
    out: str | Path,
    splits: tuple[str, ...],
    sizes: Sequence[Size],
    settings: dict[str, Any],
    load: Callable[[str], Rows],
    prepare: Callable[[Rows], Prepared],
    block_rows: int,
    batch_size: int,
    process: PartialState | None,
) -> dict[str, SkipReport]:
    """Write a codes cache; :func:`encode_source`, :func:`unified.data.interleaved.encode_interleaved`,
    :func:`unified.data.labelled.encode_labelled`, :func:`unified.data.pairs.encode_pairs` and
    :func:`unified.data.chat.encode_chat` say of what.

    Args:
        tokenizer, out, splits, block_rows, batch_size, process: as in :func:`encode_source`.
        sizes: sizes of the encoded images.
        settings: what the cache depends on, with ``source`` and ``columns``; a begun cache of other settings is refused.
        load: opens a split of the source.
        prepare: turns its rows into undecoded ones, and says how these become records of which columns.

    Raises:
        ValueError: as :func:`encode_source`.
    """
    for height, width in sizes:
        if height % tokenizer.downsample or width % tokenizer.downsample:
            size = f"{height}" if height == width else f"{height}x{width}"
            raise ValueError(f"image_size: {size} does not divide by the tokenizer's stride {tokenizer.downsample}.")
    if not is_whole(block_rows) or not is_whole(batch_size):
        raise ValueError(f"block_rows, batch_size: {block_rows} and {batch_size} must be whole numbers of at least 1.")
    if not splits:
        raise ValueError("splits: empty; name one or more.")
    if "validation" in splits and settings.get("validation") is None:
        check_splits(settings["source"], splits[0], "validation", "splits")
    out = Path(out)
    partial = out.with_name(out.name + ".partial")
    settings = {
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "codebook_size": tokenizer.codebook_size,
        "downsample": tokenizer.downsample,
        **settings,
    }
    opened = {split: load(split) for split in splits}
    prepared = {split: prepare(rows) for split, rows in opened.items()}  # errors show before anything is written
    index, count = (process.process_index, process.num_processes) if process is not None else (0, 1)

    def wait() -> None:
        if process is not None:
            process.wait_for_everyone()

    with locked(partial, "out") if index == 0 else nullcontext():
        if index == 0:
            digests = {
                split: content_of(settings["source"], rows, _covered(settings)) for split, rows in opened.items()
            }
            settings["content"] = digests
            _begin(partial, settings)
        wait()
        for split in splits:
            encode_blocks(*prepared[split], partial / "blocks" / split, block_rows, index, count, split)
        wait()
        if index == 0:
            _finish(out, partial, splits, settings | terms_of(settings["source"], opened[splits[-1]].info))
    wait()
    reports = json.loads((out / CACHE_FILE).read_text())["rows"]
    return {split: SkipReport(**reports[split]) for split in splits}


def this_process() -> PartialState:
    """This process's place among those that the launcher started. Raises ValueError if they do not see each other."""
    process = PartialState(cpu=not torch.accelerator.is_available())
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != process.num_processes:
        raise ValueError(
            f"processes: the launcher started {started}, but each of them sees {process.num_processes}; they would write the "
            "same files. Check the accelerate configuration."
        )
    return process


def open_tokenizer(name: str) -> tuple[ImageTokenizer, PartialState]:
    """An image tokenizer on this process's device, and the process's place. Raises ValueError as :func:`this_process`."""
    process = this_process()
    tokenizer = AutoImageTokenizer.from_pretrained(name)
    if isinstance(tokenizer, nn.Module):
        tokenizer.to(process.device)
    return tokenizer, process


def source_changed(out: str | Path, storage_options: dict[str, Any] | None = None) -> bool:
    """Whether the source of a finished cache holds other images or captions than when it was encoded.

    False if nothing can be compared: the source cannot be opened any more, or an earlier version wrote the cache.
    """
    made = description_of(out)
    for split, before in made.get("content", {}).items():
        if before is None:  # a stream from elsewhere
            continue
        try:
            split = source_split(split, made.get("validation"))
            rows = load_source(made["source"], split, was_streamed(before), storage_options, made["columns"][0])
        except ValueError:
            continue
        if content_of(made["source"], first_rows(rows, made.get("max_rows")), _covered(made)) != before:
            return True
    return False


def first_rows(rows: Rows, count: int | None) -> Rows:
    """The first ``count`` rows, all of them for None."""
    if count is None:
        return rows
    return rows.select(range(min(count, len(rows)))) if isinstance(rows, datasets.Dataset) else rows.take(count)


def _covered(settings: dict[str, Any]) -> list[str]:
    """Columns that the digest of the content covers: not that of a caption that the settings hold."""
    return settings["columns"][: 1 if settings.get("caption") is not None else None]


def _begin(partial: Path, settings: dict[str, Any]) -> None:
    """Record what the blocks are made with, or compare with what was recorded."""
    record = partial / CACHE_FILE
    if record.is_file():
        before = json.loads(record.read_text())
        refuse_other("out", partial, before, {name: value for name, value in settings.items() if name != "content"})
        if before.get("content") == settings["content"]:
            return
        warnings.warn(
            f"{str(partial)!r} was begun with other images or captions of {settings['source']!r}; they are encoded again",
            stacklevel=2,
        )
        for path in partial.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK_FILE:
                path.unlink()
    write_text(record, json.dumps(settings, indent=2))


def _finish(out: Path, partial: Path, splits: tuple[str, ...], settings: dict[str, Any]) -> None:
    """Join the blocks, describe them, and put the folder in its place."""
    encoded, reports = {}, {}
    for split in splits:
        encoded[split], reports[split] = read_blocks(partial / "blocks" / split)
        if reports[split].used == 0:
            summary = reports[split].summary()
            shutil.rmtree(partial)
            raise ValueError(f"source: no usable row in split {split!r} of {settings['source']!r}; {summary}")
    whole = partial / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    datasets.DatasetDict(encoded).save_to_disk(whole)
    rows = {split: asdict(report) for split, report in reports.items()}
    (whole / CACHE_FILE).write_text(json.dumps({**settings, "rows": rows}, indent=2))
    shutil.rmtree(out, ignore_errors=True)
    whole.rename(out)
    shutil.rmtree(partial)


def load_codes(
    path: str | Path,
    split: str,
    fingerprint: str | None,
    kind: str = "captioned",
    vision: Features | None = None,
) -> datasets.Dataset:
    """Open one split of a codes cache.

    Args:
        path: folder written by :func:`write_cache`.
        split: split to open.
        fingerprint: fingerprint of the tokenizer in use; None skips the comparison.
        kind: what the rows have to be, ``captioned``, ``interleaved``, ``labelled``, ``pairs`` or ``chat``.
        vision: the encoder whose features are read beside the codes; without one they are left out.

    Raises:
        ValueError: if the folder is no cache of this kind, the split is missing, the codes are of another tokenizer or no
            whole numbers, a caption is null, a class null or negative, or features are missing or of another encoder.
    """
    if not is_codes_cache(path):
        raise ValueError(f"codes: {str(path)!r} has no {CACHE_FILE}; write it with recipes/encode_images.py.")
    description = description_of(path)
    made_with, holds = description["tokenizer_fingerprint"], description.get("kind", "captioned")
    if holds != kind:
        raise ValueError(f"codes: {str(path)!r} holds {holds} rows, not {kind} ones; give another folder.")
    if fingerprint is not None and made_with != fingerprint:
        raise ValueError(
            f"codes: {str(path)!r} was made with tokenizer {made_with}, the one in use is {fingerprint}; encode the images again."
        )
    dataset = load_source(str(path), split)
    assert isinstance(dataset, datasets.Dataset)  # a saved data set that is not streamed
    _check_columns(dataset, path, kind)
    if vision is not None:
        wanted, there = vision_key(vision), description.get("vision")
        if there != wanted:
            raise ValueError(
                f"codes: {str(path)!r} was made with features of the vision encoder {there}, the one in use is {wanted}; encode "
                "the images again, see --vision-encoder."
            )
    elif set(FEATURES) <= set(dataset.column_names):
        dataset = dataset.remove_columns(list(FEATURES))
    return dataset.with_format("numpy")


def _check_columns(rows: datasets.Dataset, path: str | Path, kind: str) -> None:
    """Raises ValueError unless the columns of a cache hold what :func:`encode_source` writes."""
    whole, text = {
        "captioned": (("codes", "height", "width"), "caption"),
        "interleaved": (("codes", "heights", "widths"), "texts"),
        "pairs": (("codes", "heights", "widths"), "texts"),
        "chat": (("codes", "heights", "widths"), "texts"),
        "labelled": (("codes", "height", "width", "label"), None),
    }[kind]
    for name in (*whole, *([] if text is None else [text])):
        column = rows.features.get(name)
        dtype = str(getattr(getattr(column, "feature", column), "dtype", None))
        if not dtype.startswith(("string", "large_string") if name == text else ("int", "uint")):
            wanted = "text" if name == text else "whole numbers"
            raise ValueError(
                f"codes: column {name!r} of {str(path)!r} holds {dtype}, not {wanted}; encode the images again."
            )
        empty = rows.data.column(name)
        if empty.null_count:
            first = empty.is_null().to_pylist().index(True)
            raise ValueError(
                f"codes: {empty.null_count} rows of {str(path)!r} have no {name}, the first is row {first}; encode the images "
                "again, or leave these rows out."
            )
    if kind == "labelled":
        negative = np.flatnonzero(rows.data.column("label").to_numpy() < 0)
        if len(negative):
            raise ValueError(
                f"codes: {len(negative)} rows of {str(path)!r} have a negative label, the first is row {negative[0]}; leave these "
                "rows out."
            )
