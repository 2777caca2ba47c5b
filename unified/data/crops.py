"""From an image to the views of it that are encoded: centre, random or ten crops, mirrored, in aspect buckets."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from unified_tokenizers.fields import is_finite, is_whole

Size = tuple[int, int]  # height, width in pixels
CROPS = ("center", "random", "ten")
_LONG = 16  # ratio of sides beyond which an image is not scaled whole
_LARGE = 2**22  # pixels of a scaled image, from where on only those that are kept are computed if they are few


@dataclass(frozen=True)
class Views:
    """Which views of an image are encoded.

    Args:
        sizes: sizes ``(height, width)``; an image goes to the one with the most similar aspect ratio.
        crop: ``center``, ``random`` (random places and scales for every row) or ``ten`` (of the centre, its corners and
            its middle, each mirrored, as LlamaGen encodes ImageNet; see :func:`center_cover`).
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
        if not isinstance(self.sizes, tuple | list) or not self.sizes or not all(map(_is_size, self.sizes)):
            raise ValueError(f"sizes: {self.sizes} must be one or more (height, width) in pixels.")
        if self.crop not in CROPS:
            raise ValueError(f"crop: {self.crop!r} is unknown; use one of {CROPS}.")
        if not is_whole(self.count) or (self.count > 1 and self.crop != "random"):
            raise ValueError(f"count: {self.count} must be at least 1, and 1 unless crop is 'random'.")
        if not is_finite(self.zoom) or self.zoom < 1:
            raise ValueError(f"zoom: {self.zoom!r} must be a finite number of at least 1.")
        if not is_whole(self.seed, 0):
            raise ValueError(f"seed: {self.seed!r} must be a whole number of at least 0.")

    def described(self) -> dict[str, Any]:
        """All fields, as JSON has them."""
        return {**asdict(self), "sizes": [list(size) for size in self.sizes]}

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
            height, width = size
            whole = center_cover(image, (int(height * self.zoom), int(width * self.zoom)))
            down, across = whole.height - height, whole.width - width
            for x, y in ((0, 0), (1, 0), (0, 1), (1, 1), (0.5, 0.5)):
                left, top = round(across * x), round(down * y)
                yield whole.crop((left, top, left + width, top + height))
        else:
            rng = np.random.default_rng((self.seed, row))
            for _ in range(self.count):
                zoom, x, y = rng.uniform(1, self.zoom), rng.random(), rng.random()
                yield fit(image, size, zoom, x, y)


def _is_size(size: object) -> bool:
    return isinstance(size, tuple | list) and len(size) == 2 and all(map(is_whole, size))


def nearest_aspect(image: Image.Image, sizes: Sequence[Size]) -> Size:
    """The size whose aspect ratio is nearest to the image's, measured as a ratio of ratios."""
    wanted = np.log(image.height / image.width)
    return min(sizes, key=lambda size: abs(np.log(size[0] / size[1]) - wanted))


def center_cover(image: Image.Image, size: Size) -> Image.Image:
    """The centre of an image as ADM (arXiv 2105.05233) prepares ImageNet: halved by box filters while it stays large enough,
    scaled by a cubic filter to cover ``size``, and cut to it.

    An image that would be scaled to far more pixels than are kept goes through :func:`fit`.
    """
    height, width = size
    if max(image.height / image.width, image.width / image.height) > _LONG:
        return fit(image, size)
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    whole = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    image = image.resize(whole, Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def fit(image: Image.Image, size: Size | int, zoom: float = 1.0, x: float = 0.5, y: float = 0.5) -> Image.Image:
    """Scale an image (antialiased, proportions kept) to cover ``zoom`` times ``size``, and cut ``size`` out of it.

    Args:
        image: any image.
        size: height and width in pixels, or the side of a square.
        zoom: at least 1.
        x, y: where to cut: (0, 0) is the upper left corner, (1, 1) the lower right one, the default the centre.
    """
    height, width = (size, size) if isinstance(size, int) else size
    scale = zoom * max(height / image.height, width / image.width)
    whole_height, whole_width = max(height, round(image.height * scale)), max(width, round(image.width * scale))
    left, top = int((whole_width - width) * x), int((whole_height - height) * y)
    lanczos = Image.Resampling.LANCZOS
    if whole_height * whole_width > max(_LARGE, 16 * zoom**2 * height * width):
        # A line of 1 x 200,000 pixels would be scaled to gigabytes. Values may differ by 2 of 255 from the way below.
        across, down = image.width / whole_width, image.height / whole_height
        right, bottom = min((left + width) * across, image.width), min((top + height) * down, image.height)
        return image.resize((width, height), lanczos, (left * across, top * down, right, bottom))
    if image.size != (whole_width, whole_height):
        image = image.resize((whole_width, whole_height), lanczos)
    return image.crop((left, top, left + width, top + height))
