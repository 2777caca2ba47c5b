"""Files: written whole or not at all, and told apart by their content."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image


def write_whole(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Write a file under another name beside ``path`` and rename it, so that no reader ever sees half of it.

    Args:
        path: the file; its folder is made.
        write: writes to the path that it is given.

    Returns:
        ``path``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.writing")  # processes may write the same file at once
    try:
        write(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def write_text(path: str | Path, text: str) -> Path:
    """Write a text in UTF-8, whole."""
    return write_whole(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def write_json(path: str | Path, content: Any) -> Path:
    """Write JSON, whole. Raises ValueError if a number is not finite."""
    return write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_image(path: str | Path, image: Image.Image) -> Path:
    """Write a PNG, whole."""
    return write_whole(path, lambda beside: image.save(beside, format="PNG"))


def file_sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_hash(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file, or of the names and contents of all files in a folder; else of the name itself."""
    path = Path(path)
    if path.is_file():
        return file_sha256(path)
    if not path.is_dir():
        return hashlib.sha256(str(path).encode()).hexdigest()  # a name on the Hub
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        digest.update(f"{file.relative_to(path)}\0{file_sha256(file)}\n".encode())
    return digest.hexdigest()
