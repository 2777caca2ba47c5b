"""Sources of captioned pictures: every kind opens, bad rows are skipped and counted."""

import io
import json

import datasets
import pytest
from PIL import Image

from unified.data import SkipReport, captioned_images, fit_square, load_source


def png(color, size=(8, 8), mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, format="PNG")
    return buffer.getvalue()


ROWS = [
    {"image": {"bytes": png("red"), "path": None}, "caption": "red square", "group": "a"},
    {"image": {"bytes": b"not a picture", "path": None}, "caption": "broken", "group": "a"},
    {"image": {"bytes": png("blue")[:40], "path": None}, "caption": "cut off", "group": "b"},
    {"image": {"bytes": png("green"), "path": None}, "caption": "   ", "group": "b"},
    {"image": {"bytes": png("green"), "path": None}, "caption": None, "group": "b"},
    {"image": {"bytes": png("blue"), "path": None}, "caption": " blue square ", "group": "b"},
]


def table():
    features = datasets.Features(
        image={"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
        caption=datasets.Value("string"),
        group=datasets.Value("string"),
    )
    return datasets.Dataset.from_list(ROWS, features=features).cast_column("image", datasets.Image(decode=False))


def read(source):
    report = SkipReport()
    rows = list(captioned_images(source, report))
    return rows, report


@pytest.mark.parametrize("kind", ["saved", "saved dict", "parquet file", "parquet folder", "streaming"])
def test_kinds_of_sources_and_skipped_rows(kind, tmp_path):
    path = tmp_path / "source"
    if kind in ("saved", "streaming"):
        table().save_to_disk(path)
    elif kind == "saved dict":
        datasets.DatasetDict(train=table()).save_to_disk(path)
    else:
        path.mkdir()
        table().to_parquet(path / "train.parquet")
        path = path / "train.parquet" if kind == "parquet file" else path
    rows, report = read(load_source(str(path), streaming=kind == "streaming"))
    assert [(row.caption, row.row, row.image.getpixel((0, 0)), row.extra) for row in rows] == [
        ("red square", 0, (255, 0, 0), {"group": "a"}),
        ("blue square", 5, (0, 0, 255), {"group": "b"}),
    ]
    assert (report.used, report.corrupt_image, report.empty_caption, report.skipped) == (2, 2, 2, 4)
    assert "row 1: corrupt image" in report.summary() and "row 3: empty caption" in report.summary()


def test_picture_folder_with_metadata(tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    for name, color in (("a", "red"), ("b", "blue")):
        (folder / f"{name}.png").write_bytes(png(color))
    lines = [{"file_name": f"{name}.png", "caption": f"picture {name}"} for name in "ab"]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows, report = read(load_source(str(tmp_path)))
    assert {(row.caption, row.image.getpixel((0, 0))) for row in rows} == {
        ("picture a", (255, 0, 0)),
        ("picture b", (0, 0, 255)),
    }
    assert report.skipped == 0


def test_transparency_is_laid_on_white():
    row = {"image": {"bytes": png((255, 0, 0, 128), mode="RGBA"), "path": None}, "caption": "half red"}
    source = datasets.Dataset.from_list([row]).cast_column("image", datasets.Image())
    rows, _ = read(source)
    assert rows[0].image.getpixel((0, 0)) == (255, 127, 127)


def test_fit_square_scales_the_short_side_and_crops_the_centre():
    wide = Image.new("RGB", (40, 20), "red")
    wide.paste("blue", (10, 0, 30, 20))
    fitted = fit_square(wide, 10)
    assert fitted.size == (10, 10) and fitted.getpixel((5, 5)) == (0, 0, 255)
    assert fit_square(fitted, 10) is fitted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("./nowhere",), "source: './nowhere' does not exist"), (("pyproject.toml",), "is a .toml file; use .parquet")],
)
def test_bad_sources_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_source(*arguments)


def test_missing_split_and_column_are_named(picture_source):
    with pytest.raises(ValueError, match=r"split: 'test' is not in .*\['train', 'validation'\]"):
        load_source(picture_source, "test")
    with pytest.raises(
        ValueError, match=r"caption_column: 'text' is not a column of the source; it has \['caption', 'image'\]"
    ):
        list(captioned_images(load_source(picture_source), SkipReport(), caption_column="text"))
