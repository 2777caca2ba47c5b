"""Files that appear whole or not at all."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Write a file under another name beside ``path``, bring it to the disk and rename it: a kill leaves the old or the new.

    Args:
        path: the file; its folder is made.
        write: writes to the path that it is given.

    Returns:
        ``path``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.writing")  # processes may write the same file at once
    try:
        write(beside)
        sync(beside)
        os.replace(beside, path)
        sync(path.parent)
    finally:
        beside.unlink(missing_ok=True)
    return path


def write_text(path: str | Path, text: str) -> Path:
    """Write a text in UTF-8, whole."""
    return write_whole(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def read_json(file: Path, name: str) -> dict[str, Any]:
    """Names with values from a JSON file. Raises ValueError, which calls the file ``name``, if it holds anything else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: {str(file)!r} is no JSON ({error}); correct it, or get it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name}: {str(file)!r} holds a {type(content).__name__}; need names with values.")
    return content


def write_json(path: str | Path, content: Any) -> Path:
    """Write JSON, whole. Raises ValueError if a number is not finite."""
    return write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
