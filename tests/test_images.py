"""Image files are read as viewers show them, in every mode and format, and cropped at no cost."""

import io
import struct
import time
import zlib

import datasets
import numpy as np
import pytest
from PIL import Image

from unified.cli import main
from unified.data import SkipReport, captioned_images, load_source
from unified.data.crops import Views, fit
from unified.serving.uploads import opened
from unified_tokenizers.images import as_rgb, read_image

RAMP = np.tile(np.linspace(0, 1, 64), (4, 1))
TURNS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def saved(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth=1, color=0, rows=b"", extra=b""):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(bits, white_is_zero, content):
    """A grey TIFF of 64 x 4 pixels, as Pillow cannot write it."""
    tags = [(256, 64), (257, 4), (258, bits), (259, 1), (262, int(not white_is_zero)), (273, 8), (277, 1), (278, 4),
            (279, len(content))]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(content)) + content + struct.pack("<H", len(tags)) + entries + b"\0" * 4


def rows_of(values):
    return b"".join(b"\0" + row.tobytes() for row in values)


def upright():
    """Red above blue, with a green corner."""
    image = Image.new("RGB", (16, 24), "red")
    image.paste("blue", (0, 12, 16, 24))
    image.paste("green", (0, 0, 8, 12))
    return image


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_files_are_turned_upright(form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright() if TURNS[orientation] is None else upright().transpose(TURNS[orientation])
    read = read_image(saved(stored, form, exif=exif, quality=95))
    assert read.size == (16, 24)
    assert np.abs(np.asarray(read).astype(int) - np.asarray(upright())).mean() < 12


def test_damaged_exif_leaves_the_image_as_it_is_stored():
    assert read_image(saved(upright(), "JPEG", exif=b"Exif\0\0nonsense")).size == (16, 24)


def test_training_command_line_and_page_read_a_phone_photo_alike(pipeline, tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = Image.new("RGB", (16, 16), "red")
    photo.paste("blue", (0, 8, 16, 16))
    photo.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "phone.png", exif=exif)
    (tmp_path / "phone.txt").write_text("red above blue")
    (row,) = captioned_images(load_source(str(tmp_path)), SkipReport())
    assert row.image.tobytes() == opened(tmp_path / "phone.png").tobytes() == photo.tobytes()
    pipeline.save_pretrained(tmp_path / "pipeline")
    photo.save(tmp_path / "upright.png")
    texts = []
    for name in ("phone", "upright"):
        files = ["--pipeline", str(tmp_path / "pipeline"), str(tmp_path / f"{name}.png")]
        assert main(["caption", *files, "--max-new-tokens", "5"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "content",
    [
        saved(Image.fromarray((RAMP * 65535).astype(np.uint16)), "PNG"),
        saved(Image.fromarray((RAMP * 65535).astype(np.uint16)), "TIFF", compression="tiff_lzw"),
        saved(Image.fromarray((RAMP * 65535).astype(">u2")), "TIFF"),
        saved(Image.fromarray((RAMP * 65535).astype(np.uint16)), "JPEG2000"),
        saved(Image.fromarray((RAMP * 65535).astype(np.int32)), "PPM"),
        saved(Image.fromarray((RAMP * 255).astype(np.int32)), "TIFF"),
        saved(Image.fromarray((RAMP * 1000).astype(np.int32)), "TIFF"),
        saved(Image.fromarray((RAMP * 4e9 - 2e9).astype(np.int32)), "TIFF"),
        saved(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
        saved(Image.fromarray((RAMP * 9 - 5).astype(np.float32)), "TIFF"),
        tiff(16, True, ((1 - RAMP) * 65535).astype("<u2").tobytes()),
        png(64, 4, 16, 2, rows_of(np.repeat((RAMP * 65535)[..., None], 3, 2).astype(">u2"))),
    ],
    ids=["png16", "tiff16", "tiff16-big-endian", "jpeg2000-16", "pgm16", "tiff-int32-of-8-bit", "tiff-int32",
         "tiff-int32-full", "tiff-float", "tiff-float-stretched", "tiff16-white-is-zero", "png48"],
)  # fmt: skip
def test_many_bits_look_as_eight(content):
    read = np.asarray(read_image(content)).astype(int)
    assert np.abs(read - (RAMP * 255)[..., None]).max() <= 1.5


def test_ranges_are_what_the_file_says():
    """Dark 16-bit images stay dark, floats in [0, 1] are not stretched, twelve bits span their own range."""
    dark = np.asarray(read_image(saved(Image.fromarray((RAMP * 6553.5).astype(np.uint16)), "PNG")))
    assert dark.min() == 0 and dark.max() == 25
    middle = np.asarray(read_image(saved(Image.fromarray((0.2 + 0.6 * RAMP).astype(np.float32)), "TIFF")))
    assert (middle.min(), middle.max()) == (51, 204)
    values = (RAMP * 4095).round().astype(int).reshape(-1, 2)
    packed = np.stack([values[:, 0] >> 4, (values[:, 0] & 15) << 4 | values[:, 1] >> 8, values[:, 1] & 255], 1)
    twelve = np.asarray(read_image(tiff(12, False, packed.astype(np.uint8).tobytes()))).astype(int)
    assert np.abs(twelve - (RAMP * 255)[..., None]).max() <= 1
    constant = read_image(saved(Image.new("F", (4, 4), 7), "TIFF"))
    assert set(constant.get_flattened_data()) == {(0, 0, 0)}
    assert as_rgb(Image.new("I", (1, 1), 200)).getpixel((0, 0)) == (200, 200, 200)


def test_transparency_of_sixteen_bits():
    keyed = png(64, 4, 16, 0, rows_of((RAMP * 65535).astype(">u2")), chunk(b"tRNS", struct.pack(">H", 0)))
    read = np.asarray(read_image(keyed))[0, :, 0]
    assert read[0] == 255 and read[1] == 4 and read[-1] == 255
    half = np.stack([RAMP * 65535, np.full_like(RAMP, 32768)], 2).astype(">u2")
    read = np.asarray(read_image(png(64, 4, 16, 4, rows_of(half))))[0, :, 0]
    assert abs(int(read[0]) - 127) <= 1 and read[-1] == 255


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "AVIF", "TIFF"])
def test_first_frame_of_an_animation(form):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "green", "blue")]
    content = saved(frames[0], form, save_all=True, append_images=frames[1:])
    red, green, blue = read_image(content).getpixel((4, 4))
    assert red > 240 and green < 10 and blue < 10


def test_colour_models():
    for image in (
        Image.new("RGB", (8, 8), "red").convert("CMYK"),
        Image.new("P", (8, 8)),
        Image.new("LA", (8, 8), (0, 0)),
    ):
        if image.mode == "P":
            image.putpalette([255, 0, 0])
        red = read_image(saved(image, "TIFF" if image.mode == "CMYK" else "PNG")).getpixel((0, 0))
        assert red == ((255, 255, 255) if image.mode == "LA" else (255, 0, 0))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot identify image file"),
        (b"nonsense", "cannot identify image file"),
        (png(40000, 40000), "pixels"),
        (png(2**31 - 1, 1), "pixels"),
        (saved(upright(), "PNG")[:60], "."),
        (saved(upright(), "JPEG")[:200], "."),
        (saved(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"), "its values are not finite"),
    ],
)
def test_files_that_cannot_be_read_say_why(content, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        read_image(content)
    (tmp_path / "file.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"file\.png"):
        read_image(tmp_path / "file.png")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM", "ICO"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_raise_nothing_else(form):
    rng = np.random.default_rng(0)
    content = saved(Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)), form)
    refused = 0
    for _ in range(100):
        damaged = bytearray(content)
        damaged[rng.integers(min(80, len(content)))] = rng.integers(256)
        try:
            read_image(bytes(damaged))
        except ValueError:
            refused += 1
    assert refused > 0


def test_size_is_checked_before_decoding():
    with pytest.raises(ValueError, match=r"16x24 pixels, at most 0\.000383 million are allowed"):
        read_image(saved(upright(), "PNG"), max_pixels=16 * 24 - 1)
    assert read_image(saved(upright(), "PNG"), max_pixels=16 * 24).size == (16, 24)


def resized_then_cropped(image, size, zoom, x, y):
    """Reference: scale the whole image, then cut."""
    scale = zoom * max(size[0] / image.height, size[1] / image.width)
    height, width = max(size[0], round(image.height * scale)), max(size[1], round(image.width * scale))
    whole = image.resize((width, height), Image.Resampling.LANCZOS) if image.size != (width, height) else image
    left, top = int((width - size[1]) * x), int((height - size[0]) * y)
    return whole.crop((left, top, left + size[1], top + size[0]))


def test_fit_equals_scaling_and_cropping_bitwise():
    rng = np.random.default_rng(0)
    for _ in range(100):
        height, width, *size = (int(side) for side in rng.integers(4, 200, 4))
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        zoom, x, y = 1 + rng.random(), rng.random(), rng.random()
        assert fit(image, tuple(size), zoom, x, y).tobytes() == resized_then_cropped(image, size, zoom, x, y).tobytes()
        assert fit(image, 64).tobytes() == resized_then_cropped(image, (64, 64), 1, 0.5, 0.5).tobytes()


@pytest.mark.parametrize("size", [(1, 200_000), (200_000, 1), (30_000, 4)])
def test_extreme_proportions_cost_nothing(size):
    image = Image.new("RGB", size, "red")
    start = time.monotonic()
    views = [fit(image, 64), *Views(((64, 64),), "ten")(image, 0), *Views(((32, 64),), "random", 4)(image, 0)]
    assert time.monotonic() - start < 1
    assert {view.size for view in views} == {(64, 64), (64, 32)}
    assert {color for view in views for color in view.get_flattened_data()} == {(255, 0, 0)}


def test_extreme_proportions_are_cut_at_the_same_place():
    """Of a tall ramp the cut rows are those that scaling and cropping would keep."""
    rows = np.linspace(0, 255, 5000).astype(np.uint8)
    image = Image.fromarray(np.repeat(rows[:, None, None], 3, 2).repeat(2, 1))
    for y in (0, 0.3, 1):
        cut = np.asarray(fit(image, 64, 1.2, 0.5, y)).astype(int)
        reference = np.asarray(resized_then_cropped(image, (64, 64), 1.2, 0.5, y)).astype(int)
        assert np.abs(cut - reference).max() <= 2


def test_rows_of_data_sets_are_read_alike():
    values = (RAMP * 65535).astype(np.uint16)
    source = datasets.Dataset.from_dict({"image": [{"bytes": saved(Image.fromarray(values), "PNG"), "path": None}],
                                         "caption": ["a ramp"]}).cast_column("image", datasets.Image())  # fmt: skip
    (row,) = captioned_images(source, SkipReport())
    assert np.abs(np.asarray(row.image).astype(int) - (RAMP * 255)[..., None]).max() <= 1
