"""Images as files, and hashes of files."""

import hashlib
from pathlib import Path

from PIL import Image

from unified.files import write_whole
from unified.pipeline.metadata import write_png


def write_image(path: str | Path, image: Image.Image) -> Path:
    """Write a PNG, whole, with what an image says of itself."""
    return write_whole(path, lambda beside: write_png(image, beside))


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
