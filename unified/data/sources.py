"""Open any source of rows: folders of images, tables, tars, saved data sets, data sets on the Hub."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from reprlib import repr as short
from typing import Any, TypeVar

import datasets
from huggingface_hub import RepoCard
from yaml import YAMLError

from unified.data.folders import files_below, image_folder, table_folder
from unified.data.held_out import part_of, take_part
from unified.data.rows import IMAGE_SUFFIXES, Rows, first_row
from unified.data.tables import READERS, as_pattern, read_tables
from unified.hub import expanded, local_path

T = TypeVar("T")


def load_source(
    source: str,
    split: str = "train",
    streaming: bool = False,
    storage_options: dict[str, Any] | None = None,
    image_column: str = "image",
    content_column: str | None = None,
) -> Rows:
    """Open any source of rows.

    Args:
        source: a folder written by ``save_to_disk``; a folder of images, with captions beside them (see
            :func:`unified.data.folders.image_folder`); a parquet, JSON or CSV file, or a ``.tar`` of images with captions
            (WebDataset), or many of them by a pattern such as ``shards/*.parquet``; a folder of such files; a name on the
            Hub. Files may lie anywhere that fsspec reads: ``s3://bucket/*.parquet``, ``https://...``. Brackets and stars in
            the name of a file or folder that exists are no pattern.
        split: name of the split to open; files and patterns have one, whatever it is called. A share of a split by content
            has a name as in :mod:`unified.data.held_out`, such as ``train.held_out_0.1``.
        streaming: read rows as they come instead of preparing the whole set first.
        storage_options: options of the file system, for files elsewhere.
        image_column: column with images or their paths; in tables, paths start from the table's folder.
        content_column: column that decides which rows a share of a split holds; default: ``image_column``.

    Raises:
        ValueError: if the source does not exist or cannot be read, has no such split, or no rows in it.
    """
    try:
        Path(source).exists()
    except (OSError, ValueError) as error:  # too long, or with a null byte
        raise ValueError(f"source: {short(source)} cannot be a path ({getattr(error, 'strerror', error)}).") from error
    if source.startswith("~"):
        source = str(expanded(source))
    if (part := part_of(split)) is not None and split not in _saved_splits(source):  # a codes cache has it as it is
        rows = load_source(source, part.split, streaming, storage_options, image_column)
        return take_part(rows, part, content_column or image_column)
    rows = _naming_errors(source, split, lambda: _open(source, split, streaming, storage_options, image_column))
    if _naming_errors(source, split, lambda: first_row(rows) if streaming else len(rows) or None) is None:
        raise ValueError(f"source: {source!r} has no rows in split {split!r}.")
    return rows


def check_splits(source: str, train: str, held_out: str, field: str) -> None:
    """Raises ValueError, naming the ``field``, if a source has one split only, so that its held-out rows are those to train on."""
    if train == held_out or part_of(held_out) is not None:
        return
    path = expanded(source)
    saved = (path / "state.json").is_file() and not (path / "dataset_dict.json").is_file()
    if saved or path.is_file() or "://" in source or (not path.exists() and any(sign in source for sign in "*?[")):
        raise ValueError(
            f"{field}: {source!r} has one split, so that {held_out!r} would be the rows of {train!r}; hold out a share of them "
            "(validation: 0.1), name other data, or leave it out."
        )


def terms_of(source: str, info: datasets.DatasetInfo | None = None) -> dict[str, Any]:
    """``license`` and ``attribution`` of a source (data or a model), None where nothing states them.

    They stand in the front matter of the ``README.md`` in a local folder or beside a local file; a licence may also stand
    in the ``info`` of a data set. A name on the Hub is not looked up.

    Raises:
        ValueError: if the front matter cannot be read.
    """
    path = expanded(source)
    readme = (path if path.is_dir() else path.parent) / "README.md"
    stated: dict[str, Any] = {}
    if path.exists() and readme.is_file():
        try:
            stated = RepoCard.load(readme).data.to_dict()
        except (YAMLError, ValueError) as error:
            raise ValueError(f"source: the front matter of {str(readme)!r} is not YAML; correct it. {error}") from error
    licence = stated.get("license") or (info and info.license) or "unknown"
    return {"license": None if licence == "unknown" else licence, "attribution": stated.get("attribution")}


def _open(source: str, split: str, streaming: bool, storage_options: dict[str, Any] | None, image_column: str) -> Rows:
    path = Path(source)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _streamed(_saved(path, split), streaming)
    if path.is_file() or "://" in source or (not path.exists() and any(sign in source for sign in "*?[")):
        suffix = Path(source.partition("?")[0] if "://" in source else source).suffix.lower()
        if suffix not in READERS:
            raise ValueError(f"source: {source!r} is a {suffix or 'nameless'} file; use one of {', '.join(READERS)}.")
        return read_tables(READERS[suffix], source, image_column, streaming, storage_options)
    if local_path(source, "source") is None:
        return _pick_split(datasets.load_dataset(source, streaming=streaming), source, split)
    images = image_folder(path, split, image_column)
    if images is not None:
        return _streamed(images, streaming)
    suffixes = {file.suffix.lower() for file in files_below(path)}
    plain = as_pattern(path) == str(path.absolute()) and not suffixes & {*READERS, *IMAGE_SUFFIXES} - {".parquet"}
    tables = None if plain else table_folder(path, split, image_column, streaming)
    if tables is not None:
        return tables
    return _pick_split(datasets.load_dataset(source, streaming=streaming), source, split)


def _saved_splits(source: str) -> list[str]:
    """Splits of a folder written by ``save_to_disk``; none of any other source."""
    listed = expanded(source) / "dataset_dict.json"
    return list(json.loads(listed.read_text())["splits"]) if listed.is_file() else []


def _saved(path: Path, split: str) -> Rows:
    """One split of a folder written by ``save_to_disk``; a data set without splits is taken for any."""
    if (path / "dataset_dict.json").is_file():
        _pick_split(dict.fromkeys(_saved_splits(str(path))), str(path), split)
        path = path / split
    if not json.loads((path / "state.json").read_text())["_data_files"]:
        return datasets.Dataset.from_dict({})  # `datasets` saves an empty one but cannot open it
    return datasets.load_from_disk(str(path))


def _streamed(rows: Rows, streaming: bool) -> Rows:
    return rows.to_iterable_dataset() if streaming and isinstance(rows, datasets.Dataset) and len(rows) else rows


def _pick_split(splits: Any, source: str, split: str) -> Any:
    if split not in splits:
        raise ValueError(f"split: {split!r} is not in {source!r}; it has {sorted(splits)}.")
    return splits[split]


def _naming_errors(source: str, split: str, read: Callable[[], T]) -> T:
    """The result of ``read``; errors of `datasets` and of file systems become a ValueError that names the source."""
    try:
        return read()
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(("source:", "split:")):
            raise
        cause: BaseException = error
        while cause.__cause__ is not None or (cause.__context__ is not None and not cause.__suppress_context__):
            cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
        text = f"{type(cause).__name__}: {cause}".splitlines()[0]
        if (
            isinstance(error, StopIteration)
            or "corresponds to no data" in str(error)
            or re.match("Empty|DataFilesNotFound", text)
        ):
            raise ValueError(f"source: {source!r} has no rows in split {split!r}.") from error
        if isinstance(error, FileNotFoundError) and "://" in source:
            raise ValueError(f"source: {source!r} does not exist or matches no file ({text}).") from error
        if "://" in source or any(sign in source for sign in "*?[") or Path(source).exists():
            raise ValueError(f"source: {source!r} cannot be read ({text}).") from error
        raise ValueError(
            f"source: {source!r} is neither a path on this machine nor to be had from the Hub ({text})."
        ) from error
