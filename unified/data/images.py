"""Square images without captions, for training an image tokenizer, in bounded memory."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import torch
from torch import Tensor

from unified.data.content import content_of
from unified.data.crops import fit
from unified.data.rows import SkipReport, open_rgb, undecoded_rows
from unified.data.sources import load_source


class Images:
    """Images by number: ``images[numbers]`` are uint8 ``(N, 3, size, size)``.

    If all of them fit into ``cache_gb``, they are decoded once, and those that cannot be read are left out. If not, they are
    decoded whenever they are asked for, and the next one stands in for one that cannot be read.

    Args:
        rows: rows with an image column, undecoded (see :func:`unified.data.rows.undecoded_rows`).
        column: name of that column.
        size: side in pixels; images are scaled and centre-cropped.
        cache_gb: memory for decoded images, in GB.
        content: digests of the sources, kept for those who compare them.

    Attributes:
        report: what could not be read so far.
        pixels: all images, or None if they do not fit.

    Raises:
        ValueError: if no image can be read.
    """

    def __init__(
        self, rows: datasets.Dataset, column: str, size: int, cache_gb: float, content: Sequence[str | None] = ()
    ):
        self.rows, self.column, self.size, self.content = rows, column, size, list(content)
        self.report = SkipReport()
        self.pixels: Tensor | None = None
        self._known: set[int] = set()  # numbers of images in the report
        self._pool = ThreadPoolExecutor(os.cpu_count())
        if len(rows) * 3 * size**2 <= cache_gb * 1e9:
            self.pixels = self._decode_all()

    def __len__(self) -> int:
        return len(self.rows if self.pixels is None else self.pixels)

    def __getitem__(self, numbers: Tensor) -> Tensor:
        if self.pixels is not None:
            return self.pixels[numbers]
        decoded = self._pool.map(self._decode, numbers.tolist())
        return torch.stack([self._or_next(*each) for each in zip(numbers.tolist(), decoded, strict=True)])

    def summary(self) -> str:
        """How many images there are and how many could not be read so far, with examples."""
        examples = "".join(f"\n  {example}" for example in self.report.examples)
        return f"{len(self)} images, {self.report.corrupt_image} corrupt ones skipped{examples}"

    def _decode(self, number: int) -> Tensor | ValueError:
        try:
            image = fit(open_rgb(self.rows[number][self.column]), self.size)
        except ValueError as error:
            return error
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def _decode_all(self) -> Tensor:
        pixels, used = torch.empty((len(self.rows), 3, self.size, self.size), dtype=torch.uint8), 0
        for number in range(len(self.rows)):
            decoded = self._decode(number)
            if isinstance(decoded, Tensor):
                pixels[used] = decoded
                used += 1
            else:
                self._note(number, decoded)
        if not used:
            raise ValueError(f"sources: no image can be read: {self.summary()}")
        return pixels[:used]

    def _or_next(self, number: int, decoded: Tensor | ValueError) -> Tensor:
        for following in range(number + 1, number + 1 + len(self)):
            if isinstance(decoded, Tensor):
                return decoded
            self._note((following - 1) % len(self), decoded)
            decoded = self._decode(following % len(self))
        raise ValueError(f"sources: no image can be read: {self.summary()}")

    def _note(self, number: int, error: ValueError) -> None:
        if number not in self._known:
            self._known.add(number)
            self.report.skip("corrupt_image", number, str(error))


def open_images(sources: Sequence[str], split: str, column: str, size: int, cache_gb: float) -> Images:
    """The images of one split of several sources, one after the other; ``content`` has a digest of each.

    Raises:
        ValueError: if a source, its split or the column is missing, or no image can be read.
    """
    opened = [load_source(source, split, image_column=column) for source in sources]
    content = [content_of(source, rows, [column]) for source, rows in zip(sources, opened, strict=True)]
    parts = [undecoded_rows(rows, column, None).select_columns([column]) for rows in opened]
    return Images(datasets.concatenate_datasets(parts), column, size, cache_gb, content)
