"""A cheap digest of what a source holds, by which a codes cache notices that its images or captions have changed."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import datasets
import fsspec
import pyarrow as pa

from unified.data.rows import Rows
from unified.data.tables import as_pattern
from unified.hub import expanded

_ROWS, _FILES = "rows:", "files:"


def content_of(source: str, rows: Rows, columns: Sequence[str]) -> str | None:
    """Digest of the rows of a source as :func:`unified.data.sources.load_source` opened them; images in the first column.

    It covers the captions, and of every image file its path, size and time of change. For images inside tables it covers
    those of the tables' files, or the fingerprint of `datasets` if they are elsewhere. For a stream it covers its local
    files, and nothing (None) if they are elsewhere: more would mean to read all of it.
    """
    digest = hashlib.sha256()
    if not isinstance(rows, datasets.Dataset):
        return _FILES + digest.hexdigest()[:16] if _add_files(digest, source) else None
    embedded = False
    known = [column for column in columns if column in rows.column_names]
    for batch in rows.select_columns(known).with_format("arrow").iter(1000):
        for column in known:
            for chunk in batch[column].chunks:
                embedded |= _add(digest, chunk, column == columns[0])
    if embedded and not _add_files(digest, source):
        digest.update(rows._fingerprint.encode())
    return _ROWS + digest.hexdigest()[:16]


def was_streamed(content: str) -> bool:
    """Whether :func:`content_of` had a stream before it."""
    return content.startswith(_FILES)


def _add_files(digest: "hashlib._Hash", source: str) -> bool:
    """Add path, size and time of change of the files of a local source; whether there are any."""
    files = _local_files(source)
    for file in files:
        digest.update(_stamp(file))
    return bool(files)


def _add(digest: "hashlib._Hash", values: pa.Array, paths: bool) -> bool:
    """Add the values of a column, or of a part of it, whose strings may be ``paths``; whether it holds images itself."""
    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    if pa.types.is_struct(values.type):
        names = [field.name for field in values.type]
        if "bytes" not in names:
            return any([_add(digest, values.field(name), paths and name != "text") for name in names])
        outside = values.field("bytes").is_null().to_pylist()
        for path, alone in zip(values.field("path").to_pylist(), outside, strict=True):
            digest.update(_stamp(path) if alone and path else f"{path}\n".encode())
        return not all(outside)
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        digest.update(str(values.value_lengths().to_pylist()).encode())
        return _add(digest, values.flatten(), paths)
    if paths and (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        for path in values.to_pylist():
            digest.update(_stamp(path or ""))
        return False
    digest.update(str(values.to_pylist()).encode())
    return pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type)


def _stamp(file: str) -> bytes:
    """Name, size and time of change of a file; the name alone of one that is elsewhere or missing."""
    try:
        stat = os.stat(file)
    except OSError:
        return f"{file}\n".encode()
    return f"{file} {stat.st_size} {stat.st_mtime_ns}\n".encode()


def _local_files(source: str) -> list[str]:
    """Files of a local source, sorted; without its ``README.md``, hidden ones and what `datasets` caches in the folder."""
    path = expanded(source)
    if path.is_dir():
        files = [str(Path(place, name)) for place, _, names in os.walk(path, followlinks=False) for name in names]
    elif "://" in source:
        return []
    else:
        files = fsspec.filesystem("file").glob(as_pattern(path))
    return sorted(file for file in files if not Path(file).name.startswith((".", "README", "cache-")))
