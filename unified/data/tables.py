"""Tables (parquet, JSON, CSV) and WebDataset tars as rows, from this machine or from anywhere that fsspec reads."""

import csv
import glob
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import fsspec

from unified.data.lines import repaired_copies, streamed_lines
from unified.data.rows import IMAGE_SUFFIXES, UNREADABLE, Rows, decode_text

READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".tar": "tar"}
# Bytes that are not UTF-8 become U+FFFD: a caption with them is one row to skip, not the end of its file.
_OPTIONS: dict[str, dict[str, Any]] = {
    "json": {"encoding": "utf-8-sig", "encoding_errors": "replace"},
    "csv": {"encoding_errors": "replace"},
}
_TEXTS = ("caption", "cls", "id", "index", "text", "txt")  # members of a sample that are read as text
_SAMPLES = 100  # samples of a tar that tell which columns it has


def read_tables(
    kind: str,
    source: str,
    image_column: str = "image",
    streaming: bool = False,
    storage_options: dict[str, Any] | None = None,
) -> Rows:
    """The rows of the files that ``source`` matches, one file after the other.

    Args:
        kind: how to read them, a value of :data:`READERS`.
        source: path, address or pattern.
        image_column: column with images or their paths, which start from the table's folder.
        streaming, storage_options: as in :func:`unified.data.sources.load_source`.

    Raises:
        ValueError: if no file matches, or a CSV file has more fields in its first row than in its header.
    """
    pattern = source if "://" in source else as_pattern(source)
    files, inner = fsspec.url_to_fs(pattern, **(storage_options or {}))
    # One address, whose query may hold a question mark, or a chain such as zip://*.csv::https://...
    known = "://" in source and ("*" not in source or "::" in source)
    names = [source] if known else sorted(files.glob(inner))
    if not names:
        raise ValueError(f"source: {source!r} does not exist or matches no file.")
    if "://" in source:
        names = [name if "://" in name else files.unstrip_protocol(name) for name in names]
    return read_files(kind, names, image_column, streaming, storage_options)


def read_files(
    kind: str,
    names: Sequence[str],
    image_column: str = "image",
    streaming: bool = False,
    storage_options: dict[str, Any] | None = None,
) -> Rows:
    """The rows of files given by name; arguments as those of :func:`read_tables`."""
    names = [name if "://" in name else os.path.abspath(name) for name in names]
    if kind == "tar":
        return _read_tars([(name, _stamp(name, storage_options)) for name in names], streaming, storage_options or {})

    def load(names: Sequence[str]) -> Rows:
        patterns = [name if "://" in name else glob.escape(name) for name in names]
        return datasets.load_dataset(
            kind, data_files=patterns, streaming=streaming, storage_options=storage_options, split="train",
            **_OPTIONS.get(kind, {}),
        )  # fmt: skip

    def read(names: Sequence[str], folder: str) -> Rows:
        rows = streamed_lines(kind, names, storage_options or {}) if streaming else None
        try:
            rows = load(names) if rows is None else rows
        except Exception:
            copies = None if streaming else repaired_copies(kind, names, storage_options or {})
            if copies is None:
                raise
            rows = load(copies)
        return images_beside(rows, image_column, folder)

    if kind == "csv":
        for name in names:
            _check_first_row(name, storage_options or {})
    folders = [name.rpartition("/")[0] for name in names]
    if len(set(folders)) == 1:
        return read(names, folders[0])
    return datasets.concatenate_datasets([read([name], folder) for name, folder in zip(names, folders, strict=True)])


def _check_first_row(name: str, storage_options: dict[str, Any]) -> None:
    """Raises ValueError if the first row of a CSV file has more fields than its header: pandas would shift the columns."""
    with fsspec.open(name, "r", encoding="utf-8", errors="replace", newline="", **storage_options) as file:
        header, first = (next(rows, []) for rows in [csv.reader(file)] * 2)
    if len(first) > len(header):
        raise ValueError(
            f"source: {name!r} has {len(first)} fields in its first row and {len(header)} in its header; put texts with commas "
            "in quotes."
        )


def _stamp(file: str, storage_options: dict[str, Any] | None) -> str:
    """What tells one state of a file from another."""
    files, name = fsspec.url_to_fs(file, **(storage_options or {}))
    return str(sorted((key, str(value)) for key, value in files.info(name).items()))


def as_pattern(path: str | Path) -> str:
    """A local path as an absolute pattern: brackets and stars in names of what exists are no wildcards."""
    path = Path(path).absolute()
    literal, rest = Path(path.anchor), list(path.parts[1:])
    while rest and (literal / rest[0]).exists():
        literal /= rest.pop(0)
    return str(Path(glob.escape(str(literal)), *rest))


def images_beside(rows: Rows, column: str, folder: str) -> Rows:
    """The rows with the paths in ``column`` starting from ``folder``, where the table lies."""
    if rows.features is None:  # a stream that finds its columns out as it goes
        return rows.map(lambda row: {column: _beside(row[column], folder)} if column in row else {})
    if column not in rows.features or not _holds_paths(rows.features[column]):
        return rows
    return rows.map(lambda value: {column: _beside(value, folder)}, input_columns=column, features=rows.features)


def _holds_paths(kind: Any) -> bool:
    if isinstance(kind, dict):
        return "bytes" not in kind and any(_holds_paths(kind[name]) for name in ("image", "path") if name in kind)
    if isinstance(kind, datasets.Value):
        return kind.dtype in ("string", "large_string")
    return _holds_paths(kind.feature) if hasattr(kind, "feature") else isinstance(kind, datasets.Json)


def _beside(value: Any, folder: str) -> Any:
    """A path, or the paths in a list of segments, from ``folder``; absolute paths and addresses stay as they are."""
    if isinstance(value, list):
        return [_beside(item, folder) for item in value]
    if isinstance(value, dict):
        return value | {name: _beside(value[name], folder) for name in ("image", "path") if name in value}
    if not isinstance(value, str) or "://" in value:
        return value
    return f"{folder}/{value}" if "://" in folder else os.path.join(folder, os.path.expanduser(value))


def _read_tars(files: list[tuple[str, str]], streaming: bool, storage_options: dict[str, Any]) -> Rows:
    """Samples of tars as rows: ``image``, or each image by its suffix if there are several, and texts.

    ``files`` are names and stamps. A stamp changes with its file, so that `datasets` does not take an older copy of its rows.
    """
    first = list(islice(_samples(files, storage_options), _SAMPLES))
    one_image = all(sum(isinstance(value, dict) for value in sample.values()) <= 1 for sample in first)
    kinds: dict[str, Any] = {}
    for sample in first:
        for name, value in sample.items():
            if isinstance(value, dict):
                kinds["image" if one_image else name] = datasets.Image()
            else:
                kinds[name] = datasets.Value("string")
    if kinds:
        kinds[UNREADABLE] = datasets.Value("string")
    if not kinds:
        return datasets.Dataset.from_dict({})
    options = {"files": files, "storage_options": storage_options, "columns": tuple(kinds), "one_image": one_image}
    made: Any = datasets.IterableDataset if streaming else datasets.Dataset
    return made.from_generator(_rows, features=datasets.Features(kinds), gen_kwargs=options)


def _rows(
    files: list[tuple[str, str]], storage_options: dict[str, Any], columns: tuple[str, ...], one_image: bool
) -> Iterator[dict[str, Any]]:
    for sample in _samples(files, storage_options):
        if one_image:
            sample["image"] = next((value for value in sample.values() if isinstance(value, dict)), None)
        yield {name: sample.get(name) for name in columns}


def _samples(files: list[tuple[str, str]], storage_options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Members of one name, such as ``a.png`` and ``a.txt``, as one dictionary: images undecoded, texts as strings.

    Members between which no header can be read are one more dictionary, of :data:`UNREADABLE`.
    """
    for file, _ in files:
        sample: dict[str, Any] = {}
        damaged: list[int] = []  # places of headers that cannot be read, since the last one that could

        class Header(tarfile.TarInfo):
            @classmethod
            def fromtarfile(cls, tarfile_: tarfile.TarFile, damaged: list[int] = damaged) -> Any:
                try:
                    return super().fromtarfile(tarfile_)
                except tarfile.InvalidHeaderError:  # type: ignore[attr-defined]
                    damaged.append(tarfile_.offset)
                    raise

        def lost(damaged: list[int] = damaged, file: str = file) -> dict[str, Any]:
            return {UNREADABLE: f"{file}: a damaged header at byte {damaged[0]}", "__url__": file}

        try:
            whole = 0
            with (
                fsspec.open(file, "rb", **storage_options) as raw,
                # ignore_zeros: go on behind what is no header
                tarfile.open(fileobj=raw, mode="r|*", tarinfo=Header, ignore_zeros=True) as tar,
            ):
                for member in tar:
                    whole += 1
                    if damaged:
                        if sample:
                            yield sample
                            sample = {}
                        yield lost()
                        damaged.clear()
                    folder, _, base = member.name.rpartition("/")
                    name, _, suffix = base.partition(".")
                    content = tar.extractfile(member) if member.isfile() else None
                    if not name or not suffix or content is None:
                        continue  # hidden, without a suffix, or no file
                    key = f"{folder}/{name}" if folder else name
                    if sample and sample["__key__"] != key:
                        yield sample
                        sample = {}
                    sample |= {"__key__": key, "__url__": file}
                    _add_member(sample, suffix.lower(), content.read(), f"{file}/{member.name}")
                if 0 < getattr(tar.fileobj, "pos", tar.offset) - tar.offset < tarfile.BLOCKSIZE:
                    raise EOFError("it ends within a header")  # tarfile takes this for the end
            if damaged and not whole:
                raise EOFError("it has no header of a member")
        except (tarfile.TarError, EOFError, OSError) as error:
            raise ValueError(f"source: {file!r} is no tar that can be read to its end ({error}).") from error
        if sample:
            yield sample
        if damaged:
            yield lost()


def _add_member(sample: dict[str, Any], suffix: str, content: bytes, path: str) -> None:
    last = suffix.rpartition(".")[2]
    if f".{last}" in IMAGE_SUFFIXES:
        sample.setdefault(suffix, {"bytes": content, "path": path})
    elif last in _TEXTS:
        sample["caption" if suffix == "txt" else suffix] = decode_text(content)
    elif last == "json":
        try:
            fields = json.loads(decode_text(content))
        except (ValueError, RecursionError) as error:
            sample[UNREADABLE] = f"{path}: no JSON ({error})"
            return
        if isinstance(fields, dict):
            for name, value in fields.items():
                if isinstance(value, str):
                    sample.setdefault(name, value)
