"""From an image to the views of it that are encoded: centre, random or ten crops, mirrored, in aspect buckets."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from unified.data.sources import fit_square

Size = tuple[int, int]  # height, width in pixels
CROPS = ("center", "random", "ten")


@dataclass(frozen=True)
class Views:
    """Which views of an image are encoded.

    Args:
        sizes: sizes ``(height, width)``; an image goes to the one with the most similar aspect ratio.
        crop: ``center``, ``random`` (places and scales generated per row) or ``ten`` (corners and centre, each mirrored, as
            LlamaGen encodes ImageNet).
        count: random crops per image.
        zoom: ``ten`` and ``random`` resize an image to this factor above what the size needs (``random``: up to).
        flips: also encode every view mirrored; ``ten`` does so anyway.
        seed: seed of the random crops; a row's crops depend on it and the row alone.

    Raises:
        ValueError: if a value is outside its range.
    """

    sizes: tuple[Size, ...]
    crop: str = "center"
    count: int = 1
    zoom: float = 1.1
    flips: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.sizes or any(min(size) < 1 for size in self.sizes):
            raise ValueError(f"sizes: {self.sizes} must be one or more (height, width) in pixels.")
        if self.crop not in CROPS:
            raise ValueError(f"crop: {self.crop!r} is unknown; use one of {CROPS}.")
        if self.count < 1 or (self.count > 1 and self.crop != "random"):
            raise ValueError(f"count: {self.count} must be at least 1, and 1 unless crop is 'random'.")
        if self.zoom < 1:
            raise ValueError(f"zoom: {self.zoom} must be at least 1.")

    def __call__(self, image: Image.Image, row: int) -> Iterator[Image.Image]:
        """The views of one image, each of one of the sizes, always in the same order."""
        size = nearest_aspect(image, self.sizes)
        for view in self._crops(image, size, row):
            yield view
            if self.flips or self.crop == "ten":
                yield ImageOps.mirror(view)

    def _crops(self, image: Image.Image, size: Size, row: int) -> Iterator[Image.Image]:
        if self.crop == "center":
            yield fit(image, size)
        elif self.crop == "ten":
            whole = cover(image, size, self.zoom)
            for x, y in ((0, 0), (1, 0), (0, 1), (1, 1), (0.5, 0.5)):
                yield cut(whole, size, x, y)
        else:
            rng = np.random.default_rng((self.seed, row))
            for _ in range(self.count):
                zoom, x, y = rng.uniform(1, self.zoom), rng.random(), rng.random()
                yield cut(cover(image, size, float(zoom)), size, float(x), float(y))


def nearest_aspect(image: Image.Image, sizes: Sequence[Size]) -> Size:
    """The size whose aspect ratio is nearest to the image's, measured as a ratio of ratios."""
    wanted = np.log(image.height / image.width)
    return min(sizes, key=lambda size: abs(np.log(size[0] / size[1]) - wanted))


def cover(image: Image.Image, size: Size, zoom: float = 1.0) -> Image.Image:
    """Resize (antialiased, proportions kept) to cover ``zoom`` times ``size``."""
    scale = zoom * max(size[0] / image.height, size[1] / image.width)
    height, width = max(size[0], round(image.height * scale)), max(size[1], round(image.width * scale))
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)


def cut(image: Image.Image, size: Size, x: float, y: float) -> Image.Image:
    """Cut ``size`` out of an image at least as large; (0, 0) is its upper left corner, (1, 1) its lower right."""
    left, top = int((image.width - size[1]) * x), int((image.height - size[0]) * y)
    return image.crop((left, top, left + size[1], top + size[0]))


def fit(image: Image.Image, size: Size) -> Image.Image:
    """Resize and crop the centre to ``size``."""
    return fit_square(image, size[0]) if size[0] == size[1] else cut(cover(image, size), size, 0.5, 0.5)
