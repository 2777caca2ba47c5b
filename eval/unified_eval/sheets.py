"""Sheets of images with captions, for eyes rather than for measuring."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal, TypeVar

from PIL import Image, ImageDraw, ImageFont

T = TypeVar("T")
Resample = Literal["lanczos", "nearest"]

INK, FAINT, FRAME, PAPER = "#1d2430", "#5b6675", "#d9dee5", "#ffffff"
GAP = 14
LINE = 1.3


def captioned_grid(
    rows: Sequence[Sequence[Image.Image]],
    captions: Sequence[Sequence[str]] | None = None,
    column_titles: Sequence[str] | None = None,
    row_titles: Sequence[str] | None = None,
    title: str | None = None,
    scale: int = 128,
    resample: Resample = "lanczos",
) -> Image.Image:
    """Lay images out in rows on white, each with its caption below.

    Args:
        rows: images by rows; the last rows may be shorter.
        captions: one text for each image, in the same rows; wrapped below it, at most four lines.
        column_titles: one header for each column, such as ``real`` and ``reconstruction``.
        row_titles: one text for each row, wrapped at its left.
        title: a headline.
        scale: side of a tile in pixels. Images keep their proportions and fill the tile at least in one direction.
        resample: ``lanczos``, or ``nearest`` for hard pixels; ``nearest`` enlarges by a whole factor.

    Returns:
        An RGB image.

    Raises:
        ValueError: if there is no image, a list does not match the rows, or ``scale`` is below 16.
    """
    _check(rows, captions, column_titles, row_titles, scale)
    small, medium, large = _font(12), _font(13, bold=True), _font(17, bold=True)
    columns = max(len(row) for row in rows)
    texts = [[_wrap(text, small, scale, 4) for text in row] for row in captions or [[""] * len(row) for row in rows]]
    side_titles = [_wrap(text, small, scale, 8) for text in row_titles or ["" for _ in rows]]
    heads = [_wrap(text, medium, scale, 2) for text in column_titles or []]
    text_heights = [max(_height(lines, small) for lines in row) for row in texts]
    side = scale + GAP if row_titles else 0
    title_lines = _wrap(title, large, max(side + columns * (scale + GAP) - GAP, 320), 3) if title else []
    width = 2 * GAP + max([side + columns * (scale + GAP) - GAP, *(int(large.getlength(line)) for line in title_lines)])
    head = GAP + (_height(title_lines, large) + GAP if title else 0)
    below_heads = head + (max(_height(lines, medium) for lines in heads) + 6 if heads else 0)
    height = below_heads + sum(scale + (6 + text if text else 0) + GAP for text in text_heights)

    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    _write(draw, title_lines, large, GAP, GAP, None, INK)
    for column, lines in enumerate(heads):
        # Headers sit on the images, so a one-line header is lowered beside a two-line one.
        drop = below_heads - 6 - _height(lines, medium)
        _write(draw, lines, medium, GAP + side + column * (scale + GAP), drop, scale, INK)
    top = below_heads
    for row, lines_of_row, side_lines, text_height in zip(rows, texts, side_titles, text_heights, strict=True):
        _write(draw, side_lines, small, GAP, top + max(0, (scale - _height(side_lines, small)) // 2), None, INK)
        for column, (image, lines) in enumerate(zip(row, lines_of_row, strict=True)):
            left = GAP + side + column * (scale + GAP)
            tile = _fit(image.convert("RGB"), scale, resample)
            x, y = left + (scale - tile.width) // 2, top + (scale - tile.height) // 2
            draw.rectangle((x - 1, y - 1, x + tile.width, y + tile.height), outline=FRAME)
            sheet.paste(tile, (x, y))
            _write(draw, lines, small, left, top + scale + 6, scale, FAINT)
        top += scale + (6 + text_height if text_height else 0) + GAP
    return sheet


def in_rows(items: Sequence[T], columns: int) -> list[list[T]]:
    """Cut a list into rows of ``columns``; the last may be shorter.

    Raises:
        ValueError: if ``columns`` is below 1.
    """
    if columns < 1:
        raise ValueError(f"columns: {columns} is below 1.")
    return [list(items[start : start + columns]) for start in range(0, len(items), columns)]


def _check(
    rows: Sequence[Sequence[Image.Image]],
    captions: Sequence[Sequence[str]] | None,
    column_titles: Sequence[str] | None,
    row_titles: Sequence[str] | None,
    scale: int,
) -> None:
    if not rows or not all(rows):
        raise ValueError("rows: there is no image, or an empty row; give at least one image in each row.")
    lengths = [len(row) for row in rows]
    if captions is not None and [len(row) for row in captions] != lengths:
        raise ValueError(f"captions: rows of {[len(row) for row in captions]} for images in rows of {lengths}.")
    if column_titles is not None and len(column_titles) != max(lengths):
        raise ValueError(f"column_titles: {len(column_titles)} titles for {max(lengths)} columns.")
    if row_titles is not None and len(row_titles) != len(rows):
        raise ValueError(f"row_titles: {len(row_titles)} titles for {len(rows)} rows.")
    if scale < 16:
        raise ValueError(f"scale: {scale} pixels is too small a tile; give 16 or more.")


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as matplotlib ships it: the same on every machine, with a wide range of scripts."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, most: int) -> list[str]:
    """Break a text at spaces, and inside too long words, into at most ``most`` lines; the rest becomes ``…``."""
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    if len(lines) > most:
        last = lines[most - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines = [*lines[: most - 1], last.rstrip() + "…"]
    return lines


def _height(lines: Sequence[str], font: ImageFont.FreeTypeFont) -> int:
    return round(len(lines) * font.size * LINE)


def _write(
    draw: ImageDraw.ImageDraw,
    lines: Sequence[str],
    font: ImageFont.FreeTypeFont,
    left: int,
    top: int,
    width: int | None,
    ink: str,
) -> None:
    """Write lines from the left edge, or centred on ``width``."""
    for number, line in enumerate(lines):
        indent = (width - font.getlength(line)) / 2 if width else 0
        draw.text((round(left + indent), top + round(number * font.size * LINE)), line, font=font, fill=ink)


def _fit(image: Image.Image, tile: int, resample: Resample) -> Image.Image:
    """Resize to at most ``tile`` a side; ``nearest`` enlarges by a whole factor and so may leave a margin."""
    longest = max(image.size)
    if resample == "nearest" and longest <= tile:
        factor = tile // longest
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    size = [max(1, round(side * tile / longest)) for side in image.size]
    return image.resize((size[0], size[1]), Image.Resampling.LANCZOS)
