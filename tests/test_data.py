"""Sources of captioned images: every kind opens, bad rows are skipped and counted."""

import io
import json
import tarfile

import datasets
import fsspec
import pytest
from PIL import Image

from unified.data.sources import SkipReport, captioned_images, fit_square, load_source


def png(color, size=(8, 8), mode="RGB", form="PNG"):
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, format=form)
    return buffer.getvalue()


ROWS = [
    {"image": {"bytes": png("red"), "path": None}, "caption": "red square", "group": "a"},
    {"image": {"bytes": b"not an image", "path": None}, "caption": "broken", "group": "a"},
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


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "address", ["memory://{name}/part-1.parquet", "file://{folder}/part-*.parquet", "{folder}/*.parquet"]
)
def test_files_from_anywhere(address, streaming, tmp_path):
    """One shard or all of them, through any file system; the rows of the shards one after the other."""
    shards = [table().select(range(0, 3)), table().select(range(3, 6))]
    memory = fsspec.filesystem("memory")
    for number, shard in enumerate(shards):
        shard.to_parquet(tmp_path / f"part-{number}.parquet")
        memory.pipe(f"/{tmp_path.name}/part-{number}.parquet", (tmp_path / f"part-{number}.parquet").read_bytes())
    source = address.format(name=tmp_path.name, folder=tmp_path)
    rows, report = read(load_source(source, streaming=streaming))
    wanted = ["blue square"] if "memory" in source else ["red square", "blue square"]
    assert [row.caption for row in rows] == wanted
    assert report.empty_caption == 2 and rows[-1].image.getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["png+txt", "webp+json"])
def test_tar_of_images_and_captions(kind, streaming, tmp_path):
    """As WebDataset writes them; a broken image is skipped, further fields are kept."""
    picture, caption = kind.split("+")
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for name, color in (("a", "red"), ("b", None), ("c", "blue")):
            text = f"picture {name}"
            members = {picture: png(color, form=picture.upper()) if color else b"broken"}
            members[caption] = (json.dumps({"caption": text, "width": 8}) if caption == "json" else text).encode()
            for suffix, content in members.items():
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    rows, report = read(load_source(str(tmp_path / "shard.tar"), streaming=streaming))
    assert [row.caption for row in rows] == ["picture a", "picture c"]
    for row, color in zip(rows, ((255, 0, 0), (0, 0, 255)), strict=True):
        assert max(abs(a - b) for a, b in zip(row.image.getpixel((4, 4)), color, strict=True)) < 8
        assert row.extra["__key__"].endswith(row.caption[-1])
    assert (report.corrupt_image, report.skipped) == (1, 1)


@pytest.mark.parametrize("where", [".", "train"])
def test_bare_image_folder(where, tmp_path):
    """Pictures alone have no captions; .txt files beside them are their captions."""
    folder = tmp_path / where
    folder.mkdir(exist_ok=True)
    for name, color in (("a", "red"), ("b", "blue"), ("c", "green")):
        (folder / f"{name}.png").write_bytes(png(color))
    assert load_source(str(tmp_path)).column_names == ["image"]
    (folder / "a.txt").write_text("red square\n")
    (folder / "b.txt").write_text("blue square")
    for streaming in (False, True):
        rows, report = read(load_source(str(tmp_path), streaming=streaming))
        assert [(row.caption, row.image.getpixel((0, 0))) for row in rows] == [
            ("red square", (255, 0, 0)), ("blue square", (0, 0, 255)),
        ]  # fmt: skip
        assert report.empty_caption == 1
    with pytest.raises(ValueError, match=r"'validation'.* is not in|'validation' is not in"):
        load_source(str(tmp_path), "validation")


def test_image_folder_with_metadata(tmp_path):
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
    [
        (("./nowhere",), "source: './nowhere' does not exist"),
        (("pyproject.toml",), r"is a .toml file; use one of .parquet"),
        (("memory://nowhere/*.zip",), r"is a .zip file; use one of .parquet"),
        (("memory://nowhere/x.parquet",), r"'memory://nowhere/x.parquet' does not exist or matches no file"),
        (("./nowhere/*.tar",), r"'./nowhere/\*.tar' does not exist or matches no file"),
    ],
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
