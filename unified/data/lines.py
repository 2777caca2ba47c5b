"""Lines of JSON and CSV tables, read one by one: a damaged line is one row to skip and name, not the end of its file."""

import csv
import hashlib
import io
import json
import reprlib
from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import datasets
import fsspec

from unified.data.rows import UNREADABLE
from unified.files import write_whole

_SAMPLES = 1000  # rows of a stream that tell which columns it has
# What pandas, which reads a CSV that is not streamed, takes for no value.
_NOTHING = {
    None, "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
    "NULL", "NaN", "None", "n/a", "nan", "null",
}  # fmt: skip
_READABLE = " "  # in copies; an empty field of a CSV would have no type


def streamed_lines(kind: str, files: Sequence[str], storage_options: dict[str, Any]) -> datasets.IterableDataset | None:
    """The rows of tables as they come, with a column :data:`UNREADABLE` that says what is wrong with a damaged one.

    Args:
        kind: a value of :data:`unified.data.tables.READERS`.
        files: paths or addresses.
        storage_options: options of their file system.

    Returns:
        None for tables without lines: of another kind, or JSON of one list or of one object over many lines.

    Raises:
        ValueError: if no line of a file can be read.
    """
    if kind not in _ROWS or (kind == "json" and not _has_lines(files[0], storage_options)):
        return None
    columns: dict[str, None] = {}  # in order of appearance
    good = 0
    for row in chain.from_iterable(_ROWS[kind](file, storage_options) for file in files):
        columns |= dict.fromkeys(name for name in row if name != UNREADABLE)
        good += UNREADABLE not in row
        if good == _SAMPLES:
            break
    if not columns:
        return None
    options = {
        "kind": kind,
        "files": list(files),
        "storage_options": storage_options,
        "columns": (*columns, UNREADABLE),
    }
    stream: datasets.IterableDataset = datasets.IterableDataset.from_generator(_stream, gen_kwargs=options)
    return stream


def repaired_copies(kind: str, files: Sequence[str], storage_options: dict[str, Any]) -> list[str] | None:
    """Copies of tables in which a damaged line is a row whose column :data:`UNREADABLE` says what is wrong with it.

    Copies lie in the cache of `datasets`; a changed file has another one.

    Args:
        kind: a value of :data:`unified.data.tables.READERS`.
        files: paths or addresses.
        storage_options: options of their file system.

    Returns:
        None if no line is damaged, or the tables have none; then `datasets` knows what is wrong.

    Raises:
        ValueError: if no line of a file can be read.
    """
    if kind not in _ROWS or (kind == "json" and not _has_lines(files[0], storage_options)):
        return None
    copies = [_copy(kind, file, storage_options) for file in files]
    return [path for path, _ in copies] if any(damaged for _, damaged in copies) else None


def _copy(kind: str, file: str, storage_options: dict[str, Any]) -> tuple[str, int]:
    """Path of a copy and its number of damaged lines."""
    place, name = fsspec.url_to_fs(file, **storage_options)
    stamp = str(sorted((key, str(value)) for key, value in place.info(name).items()))
    digest = hashlib.sha256(f"{file} {stamp}".encode()).hexdigest()[:32]
    path = Path(datasets.config.HF_DATASETS_CACHE) / "unified-lines" / f"{digest}.{kind}"
    damaged = 0

    def write(beside: Path) -> None:
        nonlocal damaged
        with beside.open("w", encoding="utf-8", newline="") as copy:
            if kind == "json":
                for row in _json_rows(file, storage_options):
                    damaged += UNREADABLE in row
                    copy.write(json.dumps({UNREADABLE: _READABLE} | row, ensure_ascii=False) + "\n")
                return
            rows, writer = _csv_fields(file, storage_options), csv.writer(copy)
            header: list[str] = next(rows, [])
            writer.writerow([UNREADABLE, *header])
            for fields in rows:
                wrong = isinstance(fields, str)
                damaged += wrong
                writer.writerow([fields, *[""] * len(header)] if wrong else [_READABLE, *fields])

    write_whole(path, write)
    return str(path), damaged


def _stream(
    kind: str, files: list[str], storage_options: dict[str, Any], columns: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    for row in chain.from_iterable(_ROWS[kind](file, storage_options) for file in files):
        yield {name: row.get(name) for name in columns}


def _has_lines(file: str, storage_options: dict[str, Any]) -> bool:
    with fsspec.open(file, "rb", **storage_options) as raw:
        first = next((line for line in raw if line.strip()), b"").strip()
    if first.startswith((b"[", b"\xef\xbb\xbf[")):
        return False
    return ".jsonl" in file or UNREADABLE not in _row(first, "")


def _json_rows(file: str, storage_options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One dictionary a line; of a damaged one, what is wrong as :data:`UNREADABLE`."""
    wrong, good = "", 0
    with fsspec.open(file, "rb", **storage_options) as raw:
        for number, line in enumerate(raw, 1):
            if not line.strip():
                continue
            row = _row(line.strip(), f"{file}, line {number}: ")
            good += UNREADABLE not in row
            wrong = wrong or row.get(UNREADABLE, "")
            yield row
    if wrong and not good:
        raise ValueError(f"source: {file!r} cannot be read; none of its lines is a JSON object ({wrong}).")


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig", errors="replace"), parse_constant=lambda _: None)  # NaN is no JSON
        json.dumps(row, ensure_ascii=False).encode()  # half a character, as in "\ud800", is in no text
    except (ValueError, RecursionError) as error:
        return {UNREADABLE: f"{where}no JSON ({error})"}
    return row if isinstance(row, dict) else {UNREADABLE: f"{where}{reprlib.repr(row)} is no object"}


def _csv_rows(file: str, storage_options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One dictionary of strings a row, of None where nothing is given; else as :func:`_json_rows`."""
    rows = _csv_fields(file, storage_options)
    header: list[str] = next(rows, [])
    for fields in rows:
        if isinstance(fields, str):
            yield {UNREADABLE: fields}
        else:
            yield {name: None if value in _NOTHING else value for name, value in zip_longest(header, fields)}


def _csv_fields(file: str, storage_options: dict[str, Any]) -> Iterator[Any]:
    """The header and the fields of every row; of a damaged one, what is wrong as a string."""
    with fsspec.open(file, "rb", **storage_options) as raw:
        text = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="replace", newline="")
        reader, width = csv.reader(text, strict=True), None
        while True:
            where = f"{file}, line {reader.line_num + 1}"
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if "unexpected end" in str(error):  # all that follows the quote is lost
                    raise ValueError(f"source: {file!r} cannot be read; a quote in {where} is never closed.") from error
                yield f"{where}: {error}"
                continue
            if not fields:
                continue
            width = len(fields) if width is None else width
            yield fields if len(fields) <= width else f"{where}: {len(fields)} fields, the header has {width}"


_ROWS = {"json": _json_rows, "csv": _csv_rows}
