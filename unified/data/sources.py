"""Captioned images from any `datasets` source, with bad rows skipped, counted and reported."""

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import fsspec
from huggingface_hub import RepoCard
from PIL import Image, UnidentifiedImageError
from yaml import YAMLError

from unified_tokenizers.images import as_rgb

_BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".tar": "webdataset"}
_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


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
    examples: list[str] = field(default_factory=list)

    def skip(self, reason: str, row: int, detail: str) -> None:
        """Count a row under ``reason`` and keep the first ten as examples."""
        setattr(self, reason, getattr(self, reason) + 1)
        if len(self.examples) < 10:
            self.examples.append(f"row {row}: {reason.replace('_', ' ')} ({detail})")

    @property
    def skipped(self) -> int:
        """Number of rows left out."""
        return self.corrupt_image + self.empty_caption

    def summary(self) -> str:
        """One line for the log, with examples of skipped rows."""
        line = f"{self.used} rows used, {self.corrupt_image} corrupt images and {self.empty_caption} empty captions skipped"
        return line + ("".join(f"\n  {example}" for example in self.examples))


def load_source(
    source: str, split: str = "train", streaming: bool = False, storage_options: dict[str, Any] | None = None
) -> datasets.Dataset | datasets.IterableDataset:
    """Open any `datasets` source.

    Args:
        source: a folder written by ``save_to_disk``; a folder of images, with ``metadata.jsonl``, with a ``.txt`` file of
            the same name beside every image, or bare; a parquet, JSON or CSV file, or a ``.tar`` of images with
            captions (WebDataset), or many of them by a pattern such as ``shards/*.parquet``; a folder of such files; a name
            on the Hub. Files may lie anywhere that fsspec reads: ``s3://bucket/*.parquet``, ``https://...``.
        split: name of the split to open; files and patterns have one, whatever it is called.
        streaming: read rows as they come instead of preparing the whole set first.
        storage_options: options of the file system, for files elsewhere.

    Raises:
        ValueError: if the source has no such split, or a local-looking path does not exist.
    """
    path = Path(source)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = datasets.load_from_disk(source)
        if isinstance(saved, datasets.DatasetDict):
            saved = _pick_split(saved, source, split)
        return saved.to_iterable_dataset() if streaming else saved
    if path.is_file() or "://" in source or "*" in source:
        return _load_files(source, streaming, storage_options)
    if not path.exists() and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise ValueError(f"source: {source!r} does not exist; give a data folder, a file or a Hub name.")
    pictures = _image_folder(path, split)
    if pictures is not None:
        return pictures.to_iterable_dataset() if streaming else pictures
    return _pick_split(datasets.load_dataset(source, streaming=streaming), source, split)


def _load_files(
    source: str, streaming: bool, storage_options: dict[str, Any] | None
) -> datasets.Dataset | datasets.IterableDataset:
    suffix = Path(source.partition("?")[0]).suffix
    builder = _BUILDERS.get(suffix)
    if builder is None:
        raise ValueError(f"source: {source!r} is a {suffix or 'nameless'} file; use one of {', '.join(_BUILDERS)}.")
    missing = f"source: {source!r} does not exist or matches no file"
    if "*" in source:
        files, pattern = fsspec.url_to_fs(source, **(storage_options or {}))
        if not files.glob(pattern):
            raise ValueError(f"{missing}.")
    try:
        rows = datasets.load_dataset(
            builder, data_files=source, streaming=streaming, storage_options=storage_options, split="train"
        )
    except FileNotFoundError as error:
        raise ValueError(f"{missing} ({error}).") from error
    return _name_columns(rows) if builder == "webdataset" else rows


def _name_columns(rows: Any) -> Any:
    """``image`` and ``caption`` for the members of a WebDataset: its one image, and ``txt`` or ``caption`` in ``json``."""
    pictures = [name for name in rows.column_names if name in ("jpg", "jpeg", "png", "webp")]
    for name in pictures:  # not decoded on the way, because a broken one would stop everything
        rows = rows.cast_column(name, datasets.Image(decode=False))
    if "txt" in rows.column_names:
        rows = rows.rename_column("txt", "caption")
    elif "caption" in (rows.features.get("json") or ()):
        features = {name: kind for name, kind in rows.features.items() if name != "json"}
        rows = rows.map(
            lambda record: {"caption": record["caption"]}, input_columns="json", remove_columns="json",
            features=datasets.Features({**features, "caption": datasets.Value("string")}),
        )  # fmt: skip
    if len(pictures) == 1:
        rows, pictures = rows.rename_column(pictures[0], "image"), ["image"]
    for name in pictures:
        rows = rows.cast_column(name, datasets.Image())
    return rows


def _image_folder(folder: Path, split: str) -> datasets.Dataset | None:
    """Pictures of a folder, or of its subfolder of the split's name, with captions from ``.txt`` files of the same names.

    None if there are none, or a metadata file holds the captions.
    """
    inside = folder / split
    folder = inside if inside.is_dir() else folder
    files = sorted(file for file in folder.glob("*") if file.is_file())
    pictures = [file for file in files if file.suffix.lower() in _IMAGES]
    if not pictures or any(file.stem == "metadata" for file in files):
        return None
    if folder != inside and split != "train":
        raise ValueError(f"split: {split!r} is not in {str(folder)!r}; it has ['train'].")
    columns: dict[str, list[str | None]] = {"image": [str(picture) for picture in pictures]}
    texts = [picture.with_suffix(".txt") for picture in pictures]
    if any(text.is_file() for text in texts):
        columns["caption"] = [text.read_text() if text.is_file() else None for text in texts]
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def terms_of(source: str, info: datasets.DatasetInfo | None = None) -> dict[str, Any]:
    """``license`` and ``attribution`` of a source (data or a model), None where nothing states them.

    They stand in the front matter of the ``README.md`` in a local folder or beside a local file; a licence may also stand
    in the ``info`` of a data set. A name on the Hub is not looked up.

    Raises:
        ValueError: if the front matter cannot be read.
    """
    path = Path(source)
    readme = (path if path.is_dir() else path.parent) / "README.md"
    stated: dict[str, Any] = {}
    if path.exists() and readme.is_file():
        try:
            stated = RepoCard.load(readme).data.to_dict()
        except (YAMLError, ValueError) as error:
            raise ValueError(f"source: the front matter of {str(readme)!r} is not YAML; correct it. {error}") from error
    licence = stated.get("license") or (info and info.license) or "unknown"
    return {"license": None if licence == "unknown" else licence, "attribution": stated.get("attribution")}


def _pick_split(splits: Any, source: str, split: str) -> Any:
    if split not in splits:
        raise ValueError(f"split: {split!r} is not in {source!r}; it has {sorted(splits)}.")
    return splits[split]


def captioned_images(
    source: datasets.Dataset | datasets.IterableDataset,
    report: SkipReport,
    image_column: str = "image",
    caption_column: str = "caption",
) -> Iterator[CaptionedImage]:
    """Yield the usable rows of ``source``; rows with a corrupt image or an empty caption go to ``report``.

    Raises:
        ValueError: if a named column does not exist.
    """
    rows = undecoded_rows(source, image_column, caption_column)
    yield from usable_rows(enumerate(rows), report, image_column, caption_column)


def with_caption(
    source: datasets.Dataset | datasets.IterableDataset, caption: str, column: str
) -> datasets.Dataset | datasets.IterableDataset:
    """Give all rows of a source without captions the same one. Raises ValueError if it has the column."""
    if column in (source.column_names or list(next(iter(source)))):
        raise ValueError(f"caption: the source has a column {column!r} of its own; leave caption={caption!r} out.")
    if isinstance(source, datasets.Dataset):
        return source.add_column(column, [caption] * len(source))  # type: ignore[call-arg]
    return source.map(lambda row: {column: caption})


def undecoded_rows(
    source: datasets.Dataset | datasets.IterableDataset, image_column: str, caption_column: str
) -> datasets.Dataset | datasets.IterableDataset:
    """The rows of ``source`` with images as bytes or paths. Raises ValueError if a named column does not exist."""
    columns = source.column_names or list(next(iter(source)))
    for name, column in (("image_column", image_column), ("caption_column", caption_column)):
        if column not in columns:
            raise ValueError(f"{name}: {column!r} is not a column of the source; it has {sorted(columns)}.")
    return source.cast_column(image_column, datasets.Image(decode=False))


def usable_rows(
    rows: Iterable[tuple[int, dict[str, Any]]], report: SkipReport, image_column: str, caption_column: str
) -> Iterator[CaptionedImage]:
    """Decode numbered rows of :func:`undecoded_rows`; what cannot be used goes to ``report``."""
    for index, row in rows:
        caption = row.pop(caption_column)
        if not isinstance(caption, str) or not caption.strip():
            report.skip("empty_caption", index, repr(caption))
            continue
        try:
            image = open_rgb(row.pop(image_column))
        except (UnidentifiedImageError, OSError, SyntaxError, TypeError, ValueError) as error:
            report.skip("corrupt_image", index, str(error) or type(error).__name__)
            continue
        report.used += 1
        yield CaptionedImage(image, caption.strip(), index, row)


def open_rgb(value: dict[str, Any]) -> Image.Image:
    """Decode the undecoded form of a `datasets` image (``bytes`` or ``path``) fully; transparency is laid on white."""
    image = Image.open(value["path"] if value["bytes"] is None else io.BytesIO(value["bytes"]))
    image.load()
    return as_rgb(image)


def fit_square(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to ``size`` pixels (antialiased) and crop the centre to a square."""
    if image.size == (size, size):
        return image
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - size) // 2, (height - size) // 2
    return resized.crop((left, top, left + size, top + size))
