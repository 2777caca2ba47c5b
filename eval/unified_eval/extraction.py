"""Features of any number of images: streamed, cached by content, and shared among processes."""

import atexit
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from PIL import Image
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from unified.data import load_source, open_rgb
from unified.data.rows import IMAGE_SUFFIXES
from unified.files import write_whole
from unified.hub import expanded
from unified_eval.features import Extractor
from unified_eval.npz import LazyImage, load_npz, opened

T = TypeVar("T")


def open_images(source: str | Path, split: str = "train", image_column: str = "image") -> Iterator[LazyImage]:
    """Stream the images of a folder, an ``.npz`` file (ADM's layout) or a data set, in order.

    Args:
        source: a folder with image files (taken by name, subfolders left out), an ``.npz`` file, or anything that
            :func:`unified.data.sources.load_source` opens.
        split: split of a data set.
        image_column: column of a data set.

    Yields:
        Images, or functions that load them.

    Raises:
        ValueError: if a folder holds no image, or as for :func:`unified_eval.load_npz` and ``load_source``.
    """
    path = expanded(source)
    if path.suffix == ".npz":
        yield from load_npz(path)
        return
    inside = sorted(path.iterdir()) if path.is_dir() else []
    files = [file for file in inside if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")]
    if files:
        yield from (partial(_open_file, file) for file in files)
        return
    if path.is_dir() and not inside:
        raise ValueError(f"source: {str(path)!r} is an empty folder; give one with images.")
    rows = load_source(str(source), split, image_column=image_column)
    if image_column not in (rows.column_names or [image_column]):
        raise ValueError(
            f"image_column: {image_column!r} is not a column; there are {sorted(rows.column_names or [])}."
        )
    for row in rows.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False)):
        yield partial(open_rgb, row[image_column])


def _open_file(path: Path) -> Image.Image:
    return open_rgb({"path": str(path), "bytes": None})


def extract_features(
    extractor: Extractor,
    images: Iterable[LazyImage],
    batch_size: int = 64,
    cache: str | Path | None = None,
    progress: bool = False,
    dtype: type[np.floating[Any]] = np.float64,
) -> np.ndarray:
    """Features of a stream of images, one batch in memory at a time.

    Under ``accelerate launch`` every process takes each n-th batch, and all of them return all rows. Batches are the
    same for any number of processes, and so is every bit of the result.

    Args:
        extractor: the network of :func:`unified_eval.load_extractor` or :func:`unified_eval.clip.clip_extractor`.
        images: any iterable, such as :func:`open_images` returns.
        batch_size: images per forward pass; another size changes float32 rounding, and so has its own cache entries.
        cache: folder in which features are kept, keyed by the extractor's recipe and the pixels of a batch. Images
            that were seen before, in whatever file, cost no forward pass.
        progress: show a progress bar.
        dtype: precision of the rows; networks give float32, so that nothing is lost in it.

    Returns:
        ``(N, D)``, in the order of the images.

    Raises:
        ValueError: if there is no image, ``batch_size`` is below 1, or a feature is not finite.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: {batch_size} is below 1.")
    state = process_state()
    parts: list[tuple[int, np.ndarray]] = []
    hidden = not progress or not state.is_main_process
    with tqdm(desc=f"{extractor.name} features", unit="image", disable=hidden) as bar:
        for number, batch in enumerate(batches(images, batch_size)):
            if number % state.num_processes == state.process_index:
                whole = [opened(item).convert("RGB") for item in batch]
                rows = _cached(extractor, whole, number * batch_size, cache)
                parts.append((number, rows.astype(dtype, copy=False)))
            bar.update(len(batch))
    if state.num_processes > 1:
        parts = gather_object(parts)
    if not parts:
        raise ValueError("images: there is none; give at least one.")
    return np.concatenate([rows for _, rows in sorted(parts, key=lambda part: part[0])])


def process_state() -> PartialState:
    """Which of how many processes this one is.

    Raises:
        ValueError: if several were started and do not see each other: each would do all the work.
    """
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))  # it does not read the launcher's choice itself
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != state.num_processes:
        raise ValueError(
            f"processes: {started} were started, but accelerate sees {state.num_processes}; on CPUs launch with "
            "`accelerate launch --cpu`, or set ACCELERATE_USE_CPU=true."
        )
    if started > 1:
        _close_at_exit()
    return state


@cache
def _close_at_exit() -> None:
    """Close the process group at the end of the program; left open, its threads now and then abort the process."""
    atexit.register(PartialState().destroy_process_group)


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Cut a stream into lists of ``size``; the last may be shorter."""
    stream = iter(items)
    while batch := list(islice(stream, size)):
        yield batch


def content_key(recipe: dict[str, Any], images: list[Image.Image]) -> str:
    """Hexadecimal SHA-256 of a recipe and of the sizes and pixels of RGB images."""
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode())
    for image in images:
        digest.update(f"{image.width}x{image.height}".encode())
        digest.update(image.tobytes())
    return digest.hexdigest()


def _cached(extractor: Extractor, images: list[Image.Image], first: int, cache: str | Path | None) -> np.ndarray:
    def compute() -> np.ndarray:
        try:
            return extractor(images, batch_size=len(images))
        except ValueError as error:
            raise ValueError(f"images {first} to {first + len(images) - 1}: {error}") from error

    if cache is None:
        return compute()
    file = Path(cache) / f"{content_key(extractor.recipe(), images)}.safetensors"
    if not file.is_file():
        features = compute()
        write_whole(file, lambda beside: save_file({"features": features}, beside))
    return load_file(file)["features"]
