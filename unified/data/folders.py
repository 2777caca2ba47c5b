"""A folder of images as rows: captions from ``.txt`` files or a metadata file beside them, classes from subfolders."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path

import datasets

from unified.data.rows import IMAGE_SUFFIXES, Rows, decode_text
from unified.data.tables import READERS, read_files, read_tables

_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_TABLES = (
    ".csv",
    ".jsonl",
    ".parquet",
    ".tar",
    ".zip",
)  # more likely to be the data than images in subfolders beside them
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def image_folder(folder: Path, split: str, image_column: str = "image") -> Rows | None:
    """The images of a folder and its subfolders, or of the subfolder named after the split.

    A metadata file (``metadata.jsonl``, ``.csv`` or ``.parquet``) lists the images and brings the columns; its ``file_name``
    becomes ``image_column``. Without one the columns are ``image``, ``caption`` if any image has a ``.txt`` file of its
    name, and ``label`` if the images lie in several subfolders and have no captions: the name of the subfolder.

    Returns:
        The rows, sorted by path; None if the folder holds no images, or tables besides images in its subfolders.

    Raises:
        ValueError: if the folder has no such split, or its metadata file no ``file_name``.
    """
    parts = {path.name for path in folder.iterdir() if path.is_dir()}
    root = next((folder / name for name in _SPLITS.get(split, (split,)) if name in parts), folder)
    others = {name for names in _SPLITS.values() for name in names} & parts  # subfolders of splits
    if root != folder:
        others = set()
    metadata = next((place / name for place in (root, folder) for name in _METADATA if (place / name).is_file()), None)
    if metadata is not None:
        rows: Rows | None = _listed(metadata, root, others, image_column)
    else:
        rows = _found(root, others)
    elsewhere = any(_is_image(file) for name in others for file in files_below(folder / name))
    if root == folder and (split != "train" if rows is not None else elsewhere):
        known = {name for name, names in _SPLITS.items() if others & set(names)} | (
            {"train"} if rows is not None else set()
        )
        raise ValueError(f"split: {split!r} is not in {str(folder)!r}; it has {sorted(known)}.")
    return rows


def table_folder(folder: Path, split: str, image_column: str, streaming: bool) -> Rows | None:
    """The tables of one kind, the most frequent, in a folder and its subfolders; None if there are none.

    A file belongs to the split that its path names (``train-0.csv``, ``test/a.csv``); if no path names any, all are ``train``.

    Raises:
        ValueError: if the folder has no such split.
    """
    files = [file for file in files_below(folder) if file.suffix.lower() in READERS]
    kinds = Counter(READERS[file.suffix.lower()] for file in files)
    if not files:
        return None
    kind = kinds.most_common(1)[0][0]
    found: dict[str, list[str]] = defaultdict(list)
    for file in sorted(files):
        if READERS[file.suffix.lower()] == kind:
            words = re.split(r"[^a-z]+", str(file.relative_to(folder)).lower())
            found[next((name for name, names in _SPLITS.items() if set(words) & set(names)), "")].append(str(file))
    if set(found) == {""}:
        found["train"] = found.pop("")
    if not found.get(split):
        raise ValueError(f"split: {split!r} is not in {str(folder)!r}; it has {sorted(found.keys() - {''})}.")
    return read_files(kind, found[split], image_column, streaming)


def _listed(metadata: Path, root: Path, others: set[str], image_column: str) -> Rows:
    """The rows of a metadata file that lie in ``root`` but in none of the ``others`` below it."""
    rows = read_tables(READERS[metadata.suffix], str(metadata), "file_name")
    names = rows.column_names or []
    if "file_name" in names and image_column not in names:
        rows = rows.rename_column("file_name", image_column)
    elif image_column not in names:
        raise ValueError(f"source: {str(metadata)!r} has no column 'file_name'; it has {sorted(names)}.")
    if metadata.parent != root or others:
        top = metadata.parent.absolute()
        inside = {root.name} if metadata.parent != root else None

        def wanted(path: str | None) -> bool:
            if path is None:  # of a row to be reported
                return True
            first = Path(path).relative_to(top).parts[0] if Path(path).is_relative_to(top) else ""
            return first in inside if inside else first not in others

        rows = rows.filter(wanted, input_columns=image_column)
    return rows.cast_column(image_column, datasets.Image())


def _found(root: Path, others: set[str]) -> Rows | None:
    """The image files in ``root``, without those in its subfolders ``others``."""
    files = sorted(files_below(root, others))
    texts = {file.with_suffix(""): file for file in files if file.suffix.lower() == ".txt"}
    images = [file for file in files if _is_image(file)]
    flat = any(image.parent == root for image in images)
    captioned = any(image.with_suffix("") in texts for image in images)
    if not images or (not captioned and not flat and any(file.suffix.lower() in _TABLES for file in files)):
        return None
    if captioned:  # what else has a caption is taken for an image, and reported if it is none
        missing = texts.keys() - {image.with_suffix("") for image in images}
        images += [file for file in files if file.with_suffix("") in missing and file.suffix.lower() != ".txt"]
    images.sort()
    columns: dict[str, list[str | None]] = {"image": [str(image) for image in images]}
    classes = sorted({image.parent.name for image in images})
    if captioned:
        captions = (texts.get(image.with_suffix("")) for image in images)
        columns["caption"] = [None if text is None else decode_text(text.read_bytes()) for text in captions]
    elif not flat and len(classes) > 1:
        columns["label"] = [image.parent.name for image in images]
    rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    return rows.cast_column("label", datasets.ClassLabel(names=classes)) if "label" in columns else rows


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES


def files_below(root: Path, others: Collection[str] = ()) -> Iterator[Path]:
    """Files below ``root``, also through links; hidden ones and those of folders such as ``__MACOSX`` are left out."""
    seen = set()
    for place, folders, names in os.walk(root, followlinks=True):
        seen.add(os.path.realpath(place))
        skipped = others if Path(place) == root else set()
        folders[:] = [
            name
            for name in folders
            if not name.startswith((".", "__"))
            and name not in skipped
            and os.path.realpath(os.path.join(place, name)) not in seen  # a link back
        ]
        yield from (Path(place, name) for name in names if not name.startswith("."))
