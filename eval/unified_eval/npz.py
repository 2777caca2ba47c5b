"""Sets of images as one NumPy file, as the evaluator of guided diffusion (ADM) reads them: ``arr_0``, uint8, NHWC.

Images are written and read one by one, so that a file may be larger than the memory.
"""

import math
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from unified.files import write_whole

MEMBER = "arr_0.npy"


def save_npz(path: str | Path, images: Sequence[Image.Image]) -> Path:
    """Write images of one size to a file that the original evaluator reads; it appears whole or not at all.

    Args:
        path: file to write, named ``.npz``.
        images: images; they are converted to RGB.

    Returns:
        ``path``.

    Raises:
        ValueError: if ``path`` is not named ``.npz``, there is no image, or sizes are mixed.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"path: {str(path)!r} is not named .npz.")
    if not len(images):
        raise ValueError("images: the list is empty; give at least one image.")
    width, height = images[0].size
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(images), height, width, 3)}

    def write(beside: Path) -> None:
        with (
            zipfile.ZipFile(beside, "w", zipfile.ZIP_STORED) as archive,
            archive.open(MEMBER, "w", force_zip64=True) as file,
        ):
            np.lib.format.write_array_header_1_0(file, header)
            for number, image in enumerate(images):
                if image.size != (width, height):
                    raise ValueError(
                        f"images: number {number} is {image.width}x{image.height}, the first is {width}x{height}; "
                        "bring them to one size first."
                    )
                file.write(image.convert("RGB").tobytes())

    return write_whole(path, write)


def load_npz(path: str | Path) -> Iterator[Image.Image]:
    """Yield the images of a file with ``arr_0``, uint8 ``(N, H, W, 3)``, in order.

    Raises:
        ValueError: if the file is missing, no such archive, or holds another kind of array.
    """
    path = Path(path)
    if not path.is_file() or not zipfile.is_zipfile(path):
        raise ValueError(f"path: {str(path)!r} is not an .npz file.")
    with zipfile.ZipFile(path) as archive:
        if MEMBER not in archive.namelist():
            raise ValueError(f"path: {str(path)!r} has no arr_0; it holds {archive.namelist()}.")
        with archive.open(MEMBER) as file:
            try:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, fortran, dtype = read(file)
            except (ValueError, zipfile.BadZipFile) as error:
                raise ValueError(f"path: arr_0 of {str(path)!r} is no array ({error}).") from error
            if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape or fortran:
                raise ValueError(f"path: arr_0 of {str(path)!r} is {dtype} {shape}; need uint8 (N, H, W, 3).")
            size = math.prod(shape[1:])
            for number in range(shape[0]):
                try:
                    content = file.read(size)
                except (zipfile.BadZipFile, zlib.error) as error:
                    raise ValueError(f"path: {str(path)!r} is damaged at image {number} ({error}).") from error
                if len(content) < size:
                    raise ValueError(f"path: {str(path)!r} ends within image {number} of {shape[0]}; get it again.")
                yield Image.frombytes("RGB", (shape[2], shape[1]), content)
