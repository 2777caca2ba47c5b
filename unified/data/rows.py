"""The usable rows of a source: one row that cannot be used is skipped, counted and named, and never stops the others."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Number
from typing import Any, TypeAlias

import datasets
import fsspec
from PIL import Image

from unified_tokenizers.images import as_rgb, read_image

Rows: TypeAlias = datasets.Dataset | datasets.IterableDataset
# Also formats that Pillow reads with a plugin only: without it their files are reported, not passed over.
IMAGE_SUFFIXES = (
    ".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".jxl",
    ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".psd", ".svg", ".tga", ".tif", ".tiff", ".webp",
)  # fmt: skip
UNREADABLE = "__unreadable__"  # column of damaged tables that says why a row cannot be read; blank or null if it can
_REASONS = {
    "corrupt_image": "corrupt images",
    "empty_caption": "empty captions",
    "unreadable_caption": "unreadable captions",
    "missing_class": "missing classes",
    "unreadable_row": "unreadable rows",
}


@dataclass
class CaptionedImage:
    """One usable row of a source: an RGB image, its caption, its row number and its other columns."""

    image: Image.Image
    caption: str
    row: int
    extra: dict[str, Any]


@dataclass
class SkipReport:
    """What a pass over a source left out, and why. Fill it through :func:`captioned_images`."""

    used: int = 0
    corrupt_image: int = 0
    empty_caption: int = 0
    unreadable_caption: int = 0  # not UTF-8, or no text at all
    missing_class: int = 0  # no class, or an unknown one
    unreadable_row: int = 0  # a damaged line of a table, or a damaged member of a tar
    examples: list[str] = field(default_factory=list)

    def skip(self, reason: str, row: int, detail: str) -> None:
        """Count a row under ``reason``, the name of a field, and keep the first ten as examples."""
        setattr(self, reason, getattr(self, reason) + 1)
        if len(self.examples) < 10:
            self.examples.append(f"row {row}: {reason.replace('_', ' ')} ({detail})")

    def add(self, other: "SkipReport") -> None:
        """Add the counts of a later pass, and its examples up to ten in all."""
        for name in ("used", *_REASONS):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.examples = (self.examples + other.examples)[:10]

    @property
    def skipped(self) -> int:
        """Number of rows left out."""
        return sum(getattr(self, reason) for reason in _REASONS)

    def summary(self) -> str:
        """One line for the log, then examples of the skipped rows."""
        counts = ", ".join(
            f"{getattr(self, reason)} {words}"
            for reason, words in _REASONS.items()
            if reason != "missing_class" or self.missing_class  # of rows with classes alone
        )
        return f"{self.used} rows used, {counts} skipped" + "".join(f"\n  {example}" for example in self.examples)


def captioned_images(
    source: Rows, report: SkipReport, image_column: str = "image", caption_column: str = "caption"
) -> Iterator[CaptionedImage]:
    """Yield the usable rows of ``source``; the others go to ``report``.

    Raises:
        ValueError: if a named column does not exist, or the image column holds something else.
    """
    rows = undecoded_rows(source, image_column, caption_column)
    names = class_names(rows, caption_column)
    yield from usable_rows(enumerate(rows), report, image_column, caption_column, names)


def captions(source: Rows, report: SkipReport, caption_column: str = "caption") -> Iterator[str]:
    """Yield the captions of ``source`` without looking at its images; unusable ones go to ``report``.

    Raises:
        ValueError: if the column does not exist.
    """
    check_column(source, "caption_column", caption_column)
    names = class_names(source, caption_column)
    known = [name for name in (caption_column, UNREADABLE) if name in column_names(source)]
    for number, row in enumerate(source.select_columns(known)):
        if not readable(row, report, number):
            continue
        caption = usable_caption(row[caption_column], names, report, number, "")
        if caption is not None:
            report.used += 1
            yield caption


def different_captions(source: Rows, caption_column: str = "caption") -> list[str]:
    """The captions of ``source``, each once, in its order, without unusable ones. Raises ValueError as :func:`captions`."""
    return list(dict.fromkeys(captions(source, SkipReport(), caption_column)))


def with_caption(source: Rows, caption: str, column: str) -> Rows:
    """Give all rows of a source without captions the same one. Raises ValueError if it has the column."""
    if column in column_names(source):
        raise ValueError(
            f"caption: the source already has a column {column!r}; leave caption={caption!r} out, or name another column."
        )
    if isinstance(source, datasets.Dataset):
        return source.add_column(column, [caption] * len(source))  # type: ignore[call-arg]
    return source.map(lambda row: {column: caption})


def undecoded_rows(source: Rows, image_column: str, caption_column: str | None) -> Rows:
    """The rows of ``source`` with images as bytes or paths.

    Raises:
        ValueError: if a named column does not exist, or the image column holds something else.
    """
    check_column(source, "image_column", image_column)
    if caption_column is not None:
        check_column(source, "caption_column", caption_column)
    if source.features is None:
        return source  # a stream that finds its columns out as it goes, and decodes nothing
    kind = source.features[image_column]
    images = isinstance(kind, datasets.Image) or (isinstance(kind, dict) and {"bytes", "path"} & set(kind))
    if not images and getattr(kind, "dtype", None) not in ("string", "large_string", "binary"):
        raise ValueError(f"image_column: {image_column!r} holds no images, but {kind}; name another column.")
    return source.cast_column(image_column, datasets.Image(decode=False))


def usable_rows(
    rows: Iterable[tuple[int, dict[str, Any]]],
    report: SkipReport,
    image_column: str,
    caption_column: str,
    names: list[str] | None = None,
) -> Iterator[CaptionedImage]:
    """Read numbered rows of :func:`undecoded_rows`; what cannot be used goes to ``report``.

    ``names`` are the class names if captions are class numbers; see :func:`class_names`.
    """
    for number, row in rows:
        if not readable(row, report, number):
            continue
        undecoded = row.pop(image_column)
        caption = usable_caption(row.pop(caption_column), names, report, number, file_name(undecoded))
        image = None if caption is None else usable_image(undecoded, report, number)
        if caption is not None and image is not None:
            report.used += 1
            yield CaptionedImage(image, caption, number, row)


def readable(row: dict[str, Any], report: SkipReport, number: int) -> bool:
    """Whether a row came whole out of its file; if not, a note in ``report``. Takes :data:`UNREADABLE` out of the row."""
    wrong = (row.pop(UNREADABLE, None) or "").strip()
    if wrong:
        report.skip("unreadable_row", number, wrong)
    return not wrong


def usable_image(value: Any, report: SkipReport, row: int) -> Image.Image | None:
    """The image of an undecoded value, or None and a note in ``report``."""
    try:
        return open_rgb(value)
    except ValueError as error:
        report.skip("corrupt_image", row, str(error))
        return None


def usable_caption(value: Any, names: list[str] | None, report: SkipReport, row: int, file: str) -> str | None:
    """The caption of a row, or None and a note in ``report`` that names the image's ``file``."""
    where = f"{file}: " if file else ""
    try:
        caption = caption_text(value, names)
    except ValueError as error:
        report.skip("unreadable_caption", row, f"{where}{error}")
        return None
    if not caption:
        report.skip("empty_caption", row, f"{where}{value!r}")
    return caption or None


def caption_text(value: Any, names: list[str] | None = None) -> str:
    """The text of a caption, stripped; of a list the first one that is not blank; empty if there is none.

    Numbers are read as text, or as the name of a class if ``names`` are given.

    Raises:
        ValueError: if it is no text, or was not UTF-8.
    """
    if hasattr(value, "tolist"):
        value = value.tolist()  # NumPy
    if isinstance(value, list | tuple):
        return _first_text(value, names)
    if isinstance(value, bytes):
        value = decode_text(value)
    if value is None or value != value or (names is not None and value == -1):  # nothing, not a number, no class
        return ""
    if names is not None and isinstance(value, int):
        if not 0 <= value < len(names):
            raise ValueError(f"{value} is not one of the {len(names)} classes")
        value = names[value]
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # CSV columns with gaps hold whole numbers as floats
    if isinstance(value, Number):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.60} is no text")
    if "\N{REPLACEMENT CHARACTER}" in value:
        raise ValueError(f"{value!r:.60} was not UTF-8")
    return value.lstrip("\ufeff").strip()


def _first_text(values: Sequence[Any], names: list[str] | None) -> str:
    wrong = None
    for value in values:
        try:
            if text := caption_text(value, names):
                return text
        except ValueError as error:
            wrong = error
    if wrong is not None:
        raise wrong
    return ""


def decode_text(content: bytes) -> str:
    """Text of a file: UTF-8, or what its byte-order mark says; U+FFFD for what cannot be decoded."""
    marked = content[:2] in (b"\xff\xfe", b"\xfe\xff")
    return content.decode("utf-16" if marked else "utf-8-sig", errors="replace")


def class_names(rows: Rows, column: str) -> list[str] | None:
    """Names of the classes that the numbers of a column stand for; None for any other column."""
    kind = (rows.features or {}).get(column)
    kind = getattr(kind, "feature", kind)  # of a list
    return kind.names if isinstance(kind, datasets.ClassLabel) else None


def open_rgb(value: Any) -> Image.Image:
    """Read an undecoded image, a dictionary of ``bytes`` and ``path`` or one of the two, upright and in RGB.

    See :func:`unified_tokenizers.images.read_image`. Streams that do not know their columns give decoded images.

    Raises:
        ValueError: with the file's name and the reason, if it cannot be read.
    """
    content, path = _parts(value)
    if value is None or (content is None and not path):
        raise ValueError("there is no image")
    try:
        if isinstance(value, Image.Image):
            return as_rgb(value)
        if content is None and "://" in path:
            with fsspec.open(path, "rb") as file:
                content = file.read()
        return read_image(path if content is None else content)
    except Exception as error:  # file systems raise their own errors, too
        reason = str(error) or type(error).__name__
        raise ValueError(reason if path in reason else f"{path}: {reason}") from error


def file_name(value: Any) -> str:
    """Path of an undecoded image, empty if it has none."""
    return _parts(value)[1]


def _parts(value: Any) -> tuple[bytes | None, str]:
    """Content and path of an undecoded image; streams of tables give one of them alone."""
    if isinstance(value, dict):
        return value.get("bytes"), str(value.get("path") or "")
    if isinstance(value, Image.Image):
        return b"", str(getattr(value, "filename", ""))
    return (value, "") if isinstance(value, bytes) else (None, str(value or ""))


def column_names(rows: Rows) -> list[str]:
    """Names of the columns; of a stream that does not know them, those of its first row."""
    return rows.column_names or list(first_row(rows) or {})


def check_column(rows: Rows, field: str, column: str) -> None:
    """Raises ValueError if there is no such column; ``field`` is what named it."""
    known = column_names(rows)
    if column not in known:
        raise ValueError(f"{field}: {column!r} is not a column of the source; it has {sorted(known)}.")


def first_row(rows: Rows) -> dict[str, Any] | None:
    """The first row with its images undecoded, None if there are no rows."""
    if isinstance(rows, datasets.IterableDataset) and rows.features:
        rows = rows.decode(False)
    return next(iter(rows), None)


def first_readable(rows: Rows) -> dict[str, Any] | None:
    """The first row of a stream that is not damaged, None if there is none."""
    return next((row for row in rows if not (row.get(UNREADABLE) or "").strip()), None)
