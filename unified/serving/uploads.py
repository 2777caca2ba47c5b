"""Images that visitors of the page upload: refused before they are decoded, read, and made into an image and its mask."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from unified.data.crops import fit
from unified_tokenizers.images import read_image

FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
    "GIF",
    "BMP",
)  # others of Pillow's decode more than their header says, or run programs
PIXEL_LIMIT = 16_000_000
SIDE_LIMIT = 16_384  # pixels
LAYER_LIMIT = 4  # of an edited image; the page itself sends one


def checked_inputs(preprocess_data: Callable[..., Any]) -> Callable[..., Any]:
    """Gradio's ``preprocess_data`` without its downloads, for clients may upload files, and without details of errors."""
    from gradio import Error

    async def checked(function: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        if holds_address(inputs):
            raise Error("file: addresses are not fetched here; upload the file.", duration=None, print_exception=False)
        try:
            return await preprocess_data(function, inputs, *rest, **named)
        except Error:
            raise
        except Exception as error:  # gradio prints it on the server
            raise Error("inputs: they are not what the page sends; load it again.", duration=None) from error

    return checked


def holds_address(value: Any) -> bool:
    """Whether a request's inputs hold a file that is elsewhere."""
    if isinstance(value, dict):
        return "://" in str(value.get("path", "")) or any(map(holds_address, value.values()))
    return isinstance(value, list) and any(map(holds_address, value))


def files_of_canvas(payload: Any) -> tuple[str | None, list[str]]:
    """Uploaded files of an edited image: the background and the layers. The one that they add up to is not needed."""
    if payload is None:
        return None, []
    return payload.background and payload.background.path, [layer.path for layer in payload.layers]


def check_files(background: str | Path | None, layers: Sequence[str | Path]) -> None:
    """Refuse uploaded images before they are decoded: a small file may hold a huge image.

    Raises:
        ValueError: if there is no background, one is no image or too large, or there are too many layers.
    """
    if background is None:
        raise ValueError("image: none given; upload an image.")
    if len(layers) > LAYER_LIMIT:
        raise ValueError(f"image: {len(layers)} layers, at most {LAYER_LIMIT} are allowed here; merge them.")
    for file in (background, *layers):
        try:
            with Image.open(file, formats=FORMATS) as image:
                size = image.size
        except Exception as error:  # of any kind for damaged files, and with the server's paths
            raise ValueError("image: cannot be read; upload a PNG, JPEG or WebP file.") from error
        check_size(*size)


def check_size(width: int, height: int) -> None:
    """Refuse an image with too many pixels or too long a side. Raises ValueError, which names the limit."""
    size = f"image: {width}x{height} pixels"
    if width * height > PIXEL_LIMIT:
        raise ValueError(f"{size}, at most {PIXEL_LIMIT // 10**6} million are allowed here; make it smaller.")
    if max(width, height) > SIDE_LIMIT:
        raise ValueError(f"{size}, at most {SIDE_LIMIT} are allowed on a side here; make it smaller.")


def opened(file: str | Path) -> Image.Image:
    """An uploaded image that :func:`check_files` let pass, in RGB, upright, on white. Raises ValueError if damaged."""
    try:
        return read_image(Path(file).read_bytes(), PIXEL_LIMIT)
    except ValueError as error:
        raise ValueError(f"image: cannot be read ({error}); upload a PNG, JPEG or WebP file.") from error


def image_and_mask(
    background: str | Path, layers: Sequence[str | Path], size: tuple[int, int]
) -> tuple[Image.Image, Image.Image]:
    """Image and mask of an edited image's files, scaled and cropped to ``size`` (height, width).

    Files are decoded one after the other, and one that is given again is not decoded again.

    Raises:
        ValueError: if nothing is painted, or a file is damaged.
    """
    image = opened(background)
    mask = Image.new("L", image.size)
    for layer in dict.fromkeys(layers):
        mask.paste(255, (0, 0), painted(layer))
    if mask.getbbox() is None:
        raise ValueError("mask: nothing is painted; paint over the part that shall change.")
    return fit_upload(image, size), fit_upload(mask, size).point(lambda a: 255 if a > 64 else 0)


def painted(layer: str | Path) -> Image.Image:
    """Where a layer is not transparent, as 0 and 255. Raises ValueError if the file is damaged."""
    try:
        with Image.open(layer, formats=FORMATS) as image:
            return image.convert("RGBA").getchannel("A").point(lambda a: 255 if a > 0 else 0)
    except Exception as error:  # decoders raise all sorts of errors on damaged files
        raise ValueError("image: a layer cannot be read; paint again.") from error


def fit_upload(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale and crop the centre to ``size`` (height, width).

    An image that has to be enlarged is cropped first: a line of 1 x 16,000 pixels would else grow at its whole length.
    """
    height, width = size
    if image.height < height or image.width < width:
        return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return fit(image, size)
