"""Sets of images as one NumPy file, as the evaluator of guided diffusion (ADM) reads them: ``arr_0``, uint8, NHWC.

Labels may stand beside them (``arr_1``), and in its reference batches means and covariances of their features. Images are
written and read one by one, so that a file may be larger than the memory.
"""

import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from unified.files import write_whole

IMAGES, LABELS = "arr_0.npy", "arr_1.npy"
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")  # of pool features, of spatial features


# An image, or a function that loads it: a process opens only the images that it needs.
LazyImage = Image.Image | Callable[[], Image.Image]


def save_npz(path: str | Path, images: Sequence[LazyImage], labels: Sequence[int] | np.ndarray | None = None) -> Path:
    """Write images of one size to a file that the original evaluator reads; it appears whole or not at all.

    Args:
        path: file to write, named ``.npz``.
        images: images, or functions that load them, one at a time; they are converted to RGB.
        labels: the class of each image, kept as ``arr_1``, int64.

    Returns:
        ``path``.

    Raises:
        ValueError: if ``path`` is not named ``.npz``, there is no image, sizes are mixed, or the labels are not as many.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"path: {str(path)!r} is not named .npz.")
    if not len(images):
        raise ValueError("images: the list is empty; give at least one image.")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"labels: {len(labels)} labels for {len(images)} images; give one for each.")
    width, height = opened(images[0]).size
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(images), height, width, 3)}

    def write(beside: Path) -> None:
        with zipfile.ZipFile(beside, "w", zipfile.ZIP_STORED) as archive:
            with archive.open(IMAGES, "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)
                for number, item in enumerate(images):
                    image = opened(item)
                    if image.size != (width, height):
                        raise ValueError(
                            f"images: number {number} is {image.width}x{image.height}, the first is {width}x{height}; "
                            "bring them to one size first."
                        )
                    file.write(image.convert("RGB").tobytes())
            if labels is not None:
                with archive.open(LABELS, "w") as file:
                    np.lib.format.write_array(file, np.array(labels, dtype=np.int64), allow_pickle=False)

    return write_whole(path, write)


def load_npz(path: str | Path) -> Iterator[Image.Image]:
    """Yield the images of a file with ``arr_0``, uint8 ``(N, H, W, 3)``, in order.

    Raises:
        ValueError: if the file is missing, no such archive, or holds another kind of array.
    """
    path = Path(path)
    with _archive(path) as archive, _member(archive, path) as file:
        count, height, width = _read_header(file, path)
        for number in range(count):
            try:
                content = file.read(height * width * 3)
            except (zipfile.BadZipFile, zlib.error) as error:
                raise ValueError(f"path: {str(path)!r} is damaged at image {number} ({error}).") from error
            if len(content) < height * width * 3:
                raise ValueError(f"path: {str(path)!r} ends within image {number} of {count}; get it again.")
            yield Image.frombytes("RGB", (width, height), content)


def npz_shape(path: str | Path) -> tuple[int, int, int] | None:
    """Number, height and width of the images of a file; None if it has no ``arr_0``. Errors as for :func:`load_npz`."""
    path = Path(path)
    with _archive(path) as archive:
        if IMAGES not in archive.namelist():
            return None
        with _member(archive, path) as file:
            return _read_header(file, path)


def load_statistics(path: str | Path) -> dict[str, np.ndarray]:
    """The means and covariances that a reference batch of ADM brings along: those of :data:`STATISTICS` that are there.

    Returns:
        ``mu`` ``(D,)`` and ``sigma`` ``(D, D)`` of pool features, ``mu_s`` and ``sigma_s`` of spatial ones, float64.

    Raises:
        ValueError: if the file is missing or no archive, a mean is without its covariance, or a shape is another.
    """
    path = Path(path)
    with _archive(path) as archive:
        names = [name for name in STATISTICS if f"{name}.npy" in archive.namelist()]
    with np.load(path, allow_pickle=False) as arrays:
        found = {name: np.asarray(arrays[name], dtype=np.float64) for name in names}
    for mean, covariance in (STATISTICS[:2], STATISTICS[2:]):
        if (mean in found) != (covariance in found):
            raise ValueError(f"path: {str(path)!r} has only one of {mean} and {covariance}; get it again.")
        if mean in found and (found[mean].ndim != 1 or found[covariance].shape != found[mean].shape * 2):
            raise ValueError(
                f"path: {mean} and {covariance} of {str(path)!r} are {found[mean].shape} and {found[covariance].shape}; "
                "need (D,) and (D, D)."
            )
    return found


def opened(image: LazyImage) -> Image.Image:
    """An image that may still have to be loaded."""
    return image() if callable(image) else image


def _archive(path: Path) -> zipfile.ZipFile:
    if not path.is_file() or not zipfile.is_zipfile(path):
        raise ValueError(f"path: {str(path)!r} is not an .npz file.")
    return zipfile.ZipFile(path)


def _member(archive: zipfile.ZipFile, path: Path) -> IO[bytes]:
    if IMAGES not in archive.namelist():
        raise ValueError(f"path: {str(path)!r} has no arr_0; it holds {archive.namelist()}.")
    return archive.open(IMAGES)


def _read_header(file: IO[bytes], path: Path) -> tuple[int, int, int]:
    """Number, height and width of the images that follow."""
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except (ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"path: arr_0 of {str(path)!r} is no array ({error}).") from error
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape or fortran:
        raise ValueError(f"path: arr_0 of {str(path)!r} is {dtype} {shape}; need uint8 (N, H, W, 3).")
    return shape[0], shape[1], shape[2]
