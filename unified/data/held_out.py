"""A share of a split that is held out, decided by the content of every row.

``train.held_out_0.1`` names about a tenth of the rows of ``train``, ``train.rest_0.1`` all others. Equal images fall on one
side, whatever their captions, files and places are, in every source and run: what one of them holds out no other trains on.
"""

import hashlib
import json
import re
from typing import Any, NamedTuple

import datasets
import fsspec
from PIL import Image

from unified.data.rows import Rows, check_column

_NAME = re.compile(r"(?P<split>.+)\.(?P<part>held_out|rest)_(?P<share>0\.\d+)")


class Part(NamedTuple):
    """One side of a split: its split, the share that is held out, and whether it is this share or the rest."""

    split: str
    share: float
    held_out: bool


def part_names(split: str, share: float) -> tuple[str, str]:
    """Names of the rest of a split and of the share that is held out.

    Raises:
        ValueError: unless the share lies in (0, 1).
    """
    if not 0.0001 <= share < 1:
        raise ValueError(f"validation: a share of {share} must lie in [0.0001, 1).")
    text = f"{share:.4f}".rstrip("0")
    return f"{split}.rest_{text}", f"{split}.held_out_{text}"


def part_of(name: str) -> Part | None:
    """What a name of :func:`part_names` means; None for any other name."""
    found = _NAME.fullmatch(name)
    return None if found is None else Part(found["split"], float(found["share"]), found["part"] == "held_out")


def base_split(name: str) -> str:
    """The split that a name is a part of, or is."""
    part = part_of(name)
    return name if part is None else part.split


def take_part(rows: Rows, part: Part, column: str) -> Rows:
    """The rows of one side; ``column``, with images or anything else, decides.

    Raises:
        ValueError: if there is no such column, or no row on this side.
    """
    check_column(rows, "validation", column)
    if isinstance(rows.features, datasets.Features) and isinstance(rows.features[column], datasets.Image):
        undecoded = rows.cast_column(column, datasets.Image(decode=False))
    else:
        undecoded = rows
    if isinstance(rows, datasets.IterableDataset):
        return undecoded.filter(lambda row: _is_held_out(row[column], part.share) == part.held_out)
    values = undecoded.select_columns([column])
    chosen = [i for i, row in enumerate(values) if _is_held_out(row[column], part.share) == part.held_out]
    if not chosen:
        side, fix = ("in", "larger") if part.held_out else ("outside", "smaller")
        raise ValueError(
            f"validation: none of the {len(rows)} rows lies {side} the share of {part.share} that is held out by content; "
            f"give a {fix} share."
        )
    return rows.select(chosen)


def _is_held_out(value: Any, share: float) -> bool:
    digest = hashlib.sha256()
    _feed(digest, value, image=True)
    return int.from_bytes(digest.digest()[:8], "big") < share * 2**64


def _feed(digest: "hashlib._Hash", value: Any, image: bool) -> None:
    """Add a value: of images their content, wherever it lies; of other things what they say."""
    if isinstance(value, Image.Image):
        digest.update(value.tobytes())
    elif isinstance(value, dict) and {"bytes", "path"} & set(value):
        _feed(digest, value.get("bytes") or value.get("path"), image=True)
    elif isinstance(value, dict):
        for name in sorted(value):
            digest.update(name.encode())
            _feed(digest, value[name], image=name == "image")
    elif isinstance(value, list | tuple):
        for item in value:
            _feed(digest, item, image=False)
    elif isinstance(value, bytes):
        digest.update(value)
    elif isinstance(value, str) and image:
        try:
            with fsspec.open(value, "rb") as file:
                digest.update(file.read())
        except (OSError, ValueError):  # a text, or a file that is missing, which is reported where it is read
            digest.update(value.encode(errors="surrogatepass"))
    else:
        digest.update(json.dumps(value, default=str).encode(errors="surrogatepass"))
