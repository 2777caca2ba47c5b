"""Images with classes: encoded once without captions, and as sequences of a class-conditional model."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from accelerate import PartialState

from unified.config import MAX_SIZE, Vocabulary
from unified.data.captioned import add_code_noise, grids_of
from unified.data.code_cache import Prepared, first_rows, source_split, write_cache
from unified.data.crops import Views
from unified.data.encoding import VIEW_COLUMNS, Numbered, Viewed, encode_views
from unified.data.rows import (
    Rows,
    SkipReport,
    check_column,
    class_names,
    file_name,
    readable,
    undecoded_rows,
    usable_image,
)
from unified.data.sources import load_source
from unified.sequence import ImageSegment, TokenSequence, build_sequence
from unified_tokenizers.base import ImageTokenizer


def encode_labelled(
    tokenizer: ImageTokenizer,
    source: str,
    out: str | Path,
    views: Views,
    splits: tuple[str, ...] = ("train", "validation"),
    image_column: str = "image",
    class_column: str = "label",
    batch_size: int = 64,
    streaming: bool = False,
    block_rows: int = 1024,
    process: PartialState | None = None,
    storage_options: dict[str, Any] | None = None,
    max_rows: int | None = None,
    names: Mapping[str, str] | None = None,
    validation: float | None = None,
) -> dict[str, SkipReport]:
    """Encode the images of a source and write an Arrow data set of codes, grids and classes.

    The column ``label`` of the data set knows the names of its classes if the source does. Rows without a class, or with an
    unknown one, are skipped and reported.

    Args:
        tokenizer, source, out, splits, image_column, batch_size, streaming, block_rows, process, storage_options, max_rows,
            validation: as in :func:`unified.data.code_cache.encode_source`.
        views: sizes, crops and flips; every view becomes a row.
        class_column: column of a ``datasets.ClassLabel`` or of whole numbers; of a folder of images with a folder for each
            class, ``label``.
        names: what to call the classes, by the source's own names.

    Raises:
        ValueError: as :func:`unified.data.code_cache.encode_source`, if the column holds something else, or a class has no
            entry in ``names``.
    """
    settings = {
        "kind": "labelled", "source": source, "views": views.described(), "block_rows": block_rows,
        "columns": [image_column, class_column], "max_rows": max_rows, "validation": validation, "names": digest_of(names),
    }  # fmt: skip

    def load(split: str) -> Rows:
        rows = load_source(source, source_split(split, validation), streaming, storage_options, image_column)
        return first_rows(rows, max_rows)

    def prepare(rows: Rows) -> Prepared:
        rows = undecoded_rows(rows, image_column, None)
        own = _known_names(rows, class_column)
        called = own if own is None or names is None else [_called(name, names) for name in own]

        def make(numbered: Numbered, report: SkipReport) -> Iterator[dict[str, Any]]:
            usable = _usable(numbered, report, image_column, class_column, own)
            return encode_views(tokenizer, usable, views, batch_size)

        label = datasets.Value("int32") if called is None else datasets.ClassLabel(names=called)
        return rows, make, datasets.Features({**VIEW_COLUMNS, "label": label})

    return write_cache(tokenizer, out, splits, views.sizes, settings, load, prepare, block_rows, batch_size, process)


def digest_of(names: Mapping[str, str] | None) -> str | None:
    """A few characters that stand for what classes are called, by which a cache notices other names."""
    return None if names is None else hashlib.sha256(json.dumps(sorted(names.items())).encode()).hexdigest()[:16]


def class_number(value: Any, names: list[str] | None = None) -> int:
    """The number of a class. Raises ValueError if there is none, it is negative, no whole number, or beyond ``names``."""
    if hasattr(value, "item"):
        value = value.item()  # NumPy
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # CSV columns with gaps hold whole numbers as floats
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)  # of a tar
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{value!r:.60} is not the number of a class")
    if value < 0 or value >= (MAX_SIZE if names is None else len(names)):
        raise ValueError(f"{value} is not one of the {'' if names is None else f'{len(names)} '}classes")
    return value


def labelled_sequence(
    row: dict[str, Any],
    rng: np.random.Generator,
    vocabulary: Vocabulary,
    classes: int,
    dropout: float = 0.0,
    code_noise: float = 0.0,
) -> TokenSequence:
    """``<boi> codes`` with the row's class as condition; nothing follows, so there is no ``<eoi>``.

    Args:
        row: ``label``, flat ``codes``, ``height`` and ``width`` of the grid.
        rng: source of the row's random choices.
        vocabulary: of the model.
        classes: of the model; this number is the unconditional class.
        dropout: share of rows with the unconditional class, for classifier-free guidance.
        code_noise: see :func:`unified.data.captioned.add_code_noise`.

    Raises:
        ValueError: if the codes are no whole numbers or not as many as the grid has.
    """
    dropped = bool(rng.random() < dropout)
    image = grids_of(row["codes"], [row["height"]], [row["width"]])[0]
    sequence = build_sequence([ImageSegment(image)], replace(vocabulary, bos_token_id=None))
    sequence.input_ids, sequence.labels = sequence.input_ids[:-1], sequence.labels[:-1]
    sequence.condition = classes if dropped else int(row["label"])
    if code_noise:
        add_code_noise(sequence, vocabulary, code_noise, rng)
    return sequence


def with_classes(rows: datasets.Dataset, classes: int, names: list[str] | None, path: str) -> datasets.Dataset:
    """Rows of a codes cache whose labels are the numbers of a model's classes.

    Classes with names are found by name, so that a split may lack some; numbers stay what they are.

    Args:
        rows: as :func:`unified.data.code_cache.load_codes` opens them.
        classes, names: of the model; ``names`` None where they have none.
        path: of the cache, for errors.

    Raises:
        ValueError: naming the first row with a class that the model does not have.
    """
    own = class_names(rows, "label")
    labels = rows.select_columns("label").with_format("numpy")[:]["label"].astype(np.int64)
    numbers = np.arange(max(int(labels.max(initial=-1)) + 1, len(own or [])))
    if own is not None and names is not None and own != names:
        place = {name: number for number, name in enumerate(names)}
        numbers = np.array([place.get(name, classes) for name in own])
    found = np.where(numbers < classes, numbers, classes)[labels]
    foreign = np.flatnonzero(found >= classes)
    if len(foreign):
        label = int(labels[foreign[0]])
        called = "" if own is None else f" ({own[label]!r})"
        raise ValueError(
            f"label: {label}{called} of row {foreign[0]} of {path!r} is not one of the {classes} classes of the model; set "
            "model.options.conditioning.classes, or leave these rows out."
        )
    if np.array_equal(found, labels):
        return rows
    return rows.remove_columns("label").add_column("label", found).with_format("numpy")  # type: ignore[call-arg]


def _known_names(rows: Rows, column: str) -> list[str] | None:
    """Names of the classes in a column, None if they are numbers. Raises ValueError if it holds anything else."""
    check_column(rows, "class_column", column)
    kind = (rows.features or {}).get(column)
    if isinstance(kind, datasets.ClassLabel):
        return list(kind.names)
    dtype = str(getattr(kind, "dtype", None))
    if (
        kind is not None
        and not dtype.startswith(("int", "uint", "float"))
        and not (column == "cls" and dtype == "string")
    ):
        raise ValueError(
            f"class_column: {column!r} holds {dtype if dtype != 'None' else kind}, not classes; name a column of whole numbers or "
            "of a datasets.ClassLabel, which class_encode_column makes of text."
        )
    return None


def _called(name: str, names: Mapping[str, str]) -> str:
    if name not in names:
        raise ValueError(f"class names: the class {name!r} of the source has none; add it.")
    return names[name]


def _usable(
    rows: Numbered, report: SkipReport, image_column: str, class_column: str, names: list[str] | None
) -> Iterator[Viewed]:
    """Images of rows with their classes; what cannot be used goes to ``report``."""
    for number, row in rows:
        if not readable(row, report, number):
            continue
        try:
            label = class_number(row[class_column], names)
        except ValueError as error:
            file = file_name(row[image_column])
            report.skip("missing_class", number, f"{file}: {error}" if file else str(error))
            continue
        image = usable_image(row[image_column], report, number)
        if image is not None:
            report.used += 1
            yield image, number, {"label": label}
