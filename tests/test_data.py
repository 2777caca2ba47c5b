"""Sources of captioned images: every kind opens, bad rows are skipped and counted."""

import io
import json
import struct
import tarfile

import datasets
import fsspec
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from unified.data import SkipReport, captioned_images, load_source
from unified.data.crops import fit
from unified.data.rows import caption_text, captions


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
    image, caption = kind.split("+")
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for name, color in (("a", "red"), ("b", None), ("c", "blue")):
            text = f"image {name}"
            members = {image: png(color, form=image.upper()) if color else b"broken"}
            members[caption] = (json.dumps({"caption": text, "width": 8}) if caption == "json" else text).encode()
            for suffix, content in members.items():
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    rows, report = read(load_source(str(tmp_path / "shard.tar"), streaming=streaming))
    assert [row.caption for row in rows] == ["image a", "image c"]
    for row, color in zip(rows, ((255, 0, 0), (0, 0, 255)), strict=True):
        assert max(abs(a - b) for a, b in zip(row.image.getpixel((4, 4)), color, strict=True)) < 8
        assert row.extra["__key__"].endswith(row.caption[-1])
    assert (report.corrupt_image, report.skipped) == (1, 1)


@pytest.mark.parametrize("where", [".", "train"])
def test_bare_image_folder(where, tmp_path):
    """Images alone have no captions; .txt files beside them are their captions."""
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
    lines = [{"file_name": f"{name}.png", "caption": f"image {name}"} for name in "ab"]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows, report = read(load_source(str(tmp_path)))
    assert {(row.caption, row.image.getpixel((0, 0))) for row in rows} == {
        ("image a", (255, 0, 0)),
        ("image b", (0, 0, 255)),
    }
    assert report.skipped == 0


def test_transparency_is_laid_on_white():
    row = {"image": {"bytes": png((255, 0, 0, 128), mode="RGBA"), "path": None}, "caption": "half red"}
    source = datasets.Dataset.from_list([row]).cast_column("image", datasets.Image())
    rows, _ = read(source)
    assert rows[0].image.getpixel((0, 0)) == (255, 127, 127)


def test_fit_scales_the_short_side_and_crops_the_centre():
    wide = Image.new("RGB", (40, 20), "red")
    wide.paste("blue", (10, 0, 30, 20))
    fitted = fit(wide, 10)
    assert fitted.size == (10, 10) and fitted.getpixel((5, 5)) == (0, 0, 255)
    assert fit(fitted, 10).tobytes() == fitted.tobytes()


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


def add_images(folder, count=3):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"p{number}.png").write_bytes(png("red"))


class TestCaptions:
    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (" a cat\n", "a cat"), ("\ufeffa cat", "a cat"), (["a cat", "an animal"], "a cat"), (["", None, "b"], "b"),
            (np.array(["a", "b"]), "a"), (("a",), "a"), (3, "3"), (3.0, "3"), (2.5, "2.5"), (np.int64(7), "7"),
            ("caf\u00e9".encode(), "caf\u00e9"), (b"\xff\xfea\0", "a"), (["caf\ufffd", "coffee"], "coffee"),
            (None, ""), ("  ", ""), ([], ""), (float("nan"), ""),
        ],
    )  # fmt: skip
    def test_what_is_read_as_text(self, value, text):
        assert caption_text(value) == text

    @pytest.mark.parametrize(
        ("value", "reason"),
        [
            ({"en": "a"}, "is no text"),
            ("caf\ufffd", "was not UTF-8"),
            (b"caf\xe9", "was not UTF-8"),
            ([{}], "is no text"),
        ],
    )
    def test_what_is_no_text_says_why(self, value, reason):
        with pytest.raises(ValueError, match=reason):
            caption_text(value)

    @pytest.mark.parametrize("streaming", [False, True])
    def test_classes_are_read_by_name(self, streaming):
        kind = datasets.ClassLabel(names=["cat", "dog"])
        features = datasets.Features(image=datasets.Image(), caption=kind, several=datasets.List(kind))
        images = [{"bytes": png("red"), "path": None}] * 3
        columns = {"image": images, "caption": [1, 0, -1], "several": [[1, 0], [0], []]}
        source = datasets.Dataset.from_dict(columns, features=features)
        source = source.to_iterable_dataset() if streaming else source
        rows, report = read(source)
        assert [row.caption for row in rows] == ["dog", "cat"] and report.examples == ["row 2: empty caption (-1)"]
        rows, report = list(captioned_images(source, report := SkipReport(), caption_column="several")), report
        assert [row.caption for row in rows] == ["dog", "cat"] and report.empty_caption == 1

    def test_text_files(self, tmp_path):
        """Marks at the start say the encoding; a file in another one is a skipped row that is named."""
        contents = ["\ufeffred".encode(), "r\u00f6d".encode("latin-1"), "blue".encode("utf-16"), b""]
        add_images(tmp_path, 5)
        for number, content in enumerate(contents):
            (tmp_path / f"p{number}.txt").write_bytes(content)
        rows, report = read(load_source(str(tmp_path)))
        assert [(row.row, row.caption) for row in rows] == [(0, "red"), (2, "blue")]
        assert (report.unreadable_caption, report.empty_caption, report.skipped) == (1, 2, 3)
        assert f"row 1: unreadable caption ({tmp_path}/p1.png: 'r\ufffdd' was not UTF-8)" in report.summary()
        assert f"row 3: empty caption ({tmp_path}/p3.png: '')" in report.summary()

    @pytest.mark.parametrize("kind", ["csv", "jsonl"])
    def test_tables(self, kind, tmp_path):
        """One caption in another encoding is one row."""
        add_images(tmp_path)
        texts = ["\ufeff", "plain", "r\u00f6d", "last"]
        line = "p0.png,{}" if kind == "csv" else '{{"image": "p0.png", "caption": "{}"}}'
        lines = [*(["image,caption"] if kind == "csv" else []), *(line.format(text) for text in texts[1:])]
        content = texts[0].encode() + "\n".join(lines).encode("latin-1")
        (tmp_path / f"table.{kind}").write_bytes(content)
        rows, report = read(load_source(str(tmp_path / f"table.{kind}")))
        assert [row.caption for row in rows] == ["plain", "last"] and report.unreadable_caption == 1
        assert "p0.png" in report.examples[0]

    def test_mixed_kinds_in_json(self, tmp_path):
        add_images(tmp_path)
        values = ["one", 2, ["", "three"], {"en": "four"}, None]
        lines = [json.dumps({"image": "p0.png", "caption": value}) for value in values]
        (tmp_path / "rows.jsonl").write_text("\n".join(lines))
        rows, report = read(load_source(str(tmp_path / "rows.jsonl")))
        assert [row.caption for row in rows] == ["one", "2", "three"]
        assert (report.unreadable_caption, report.empty_caption) == (1, 1)
        assert list(captions(load_source(str(tmp_path / "rows.jsonl")), SkipReport())) == ["one", "2", "three"]


class TestFolders:
    @pytest.mark.filterwarnings("ignore:Image size")
    def test_every_captioned_image_is_used_or_named(self, tmp_path):
        names = ["a.png", "b.JPG", "c.gif", "d.tiff", "e.jfif", "f.avif", "g.webp", "sub/h.png", "sub/deep/i.bmp"]
        forms = {".JPG": "JPEG", ".jfif": "JPEG", ".tiff": "TIFF"}
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            suffix = name[name.index(".") :]
            (tmp_path / name).write_bytes(png("red", form=forms.get(suffix, suffix[1:].upper())))
        unusable = ["j.heic", "k.exr", "l", "m.png"]
        for name in unusable:
            (tmp_path / name).write_bytes(b"nothing that can be read")
        for name in [*names, *unusable]:
            (tmp_path / name).with_suffix(".TXT" if name == "b.JPG" else ".txt").write_text(name)
        (tmp_path / ".hidden.png").write_bytes(png("red"))
        (tmp_path / "a.npz").write_bytes(b"made from a.png by another tool")
        rows, report = read(load_source(str(tmp_path)))
        assert sorted(row.caption for row in rows) == sorted(names)
        assert report.corrupt_image == report.skipped == len(unusable)
        assert all(any(f"{tmp_path / name}:" in example for example in report.examples) for name in unusable)

    @pytest.mark.process
    @pytest.mark.parametrize("name", ["photos [2024]", "best*", "what?"])
    @pytest.mark.parametrize("kind", ["txt", "metadata.jsonl", "metadata.csv", "table", "parquet", "saved", "tar"])
    @pytest.mark.parametrize("streaming", [False, True])
    def test_brackets_and_stars_in_names_that_exist(self, name, kind, streaming, tmp_path):
        folder = tmp_path / name
        add_images(folder / "best [1]", 2)
        source, images = folder, [f"best [1]/p{number}.png" for number in range(2)]
        if kind == "txt":
            for image in images:
                (folder / image).with_suffix(".txt").write_text("red")
        elif kind in ("parquet", "saved"):
            table = datasets.Dataset.from_dict({"image": [{"bytes": png("red")}] * 2, "caption": ["red"] * 2})
            table.save_to_disk(folder / "saved") if kind == "saved" else table.to_parquet(folder / "data.parquet")
            source = folder / "saved" if kind == "saved" else folder / "*.parquet"
        elif kind == "tar":
            with tarfile.open(folder / "shard.tar", "w") as tar:
                for image in images:
                    tar.add(folder / image, image)
                    tar.add(ROOT / "pyproject.toml", image.replace("png", "txt"))
            source = folder / "shard.tar"
        else:
            file = "table [2].csv" if kind == "table" else kind
            lines = [json.dumps({"file_name": image, "caption": "red"}) for image in images]
            if file.endswith("csv"):
                lines = ["file_name,caption", *(f"{image},red" for image in images)]
            (folder / file).write_text("\n".join(lines))
            source = folder / file if kind == "table" else folder
        column = "file_name" if kind == "table" else "image"
        report = SkipReport()
        source = load_source(str(source), streaming=streaming, image_column=column)
        rows = list(captioned_images(source, report, column))
        assert [row.image.getpixel((0, 0)) for row in rows] == [(255, 0, 0)] * 2, report.summary()

    def test_splits_and_classes(self, tmp_path):
        for name in ("train/cat/a.png", "train/dog/b.png", "val/cat/c.png"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(png("red"))
        for split, expected in (("train", ["cat", "dog"]), ("validation", [])):
            source = load_source(str(tmp_path), split)
            assert len(source) == max(1, len(expected))
            if expected:
                rows = captioned_images(source, SkipReport(), caption_column="label")
                assert [row.caption for row in rows] == expected
        (tmp_path / "val" / "cat" / "c.txt").write_text("a cat")
        assert [row.caption for row in read(load_source(str(tmp_path), "validation"))[0]] == ["a cat"]
        with pytest.raises(ValueError, match=r"split: 'test' is not in .*; it has \['train', 'validation'\]"):
            load_source(str(tmp_path), "test")

    def test_one_metadata_file_for_all_splits(self, tmp_path):
        add_images(tmp_path / "train", 2)
        add_images(tmp_path / "val", 1)
        files = ["train/p0.png", "train/p1.png", "val/p0.png", "train/missing.png"]
        (tmp_path / "metadata.csv").write_text("file_name,caption\n" + "\n".join(f"{name},{name}" for name in files))
        rows, report = read(load_source(str(tmp_path)))
        assert [row.caption for row in rows] == files[:2]
        assert report.corrupt_image == 1 and "train/missing.png" in report.examples[0]
        assert [row.caption for row in read(load_source(str(tmp_path), "validation"))[0]] == files[2:3]
        (tmp_path / "metadata.csv").write_text("file,caption\ntrain/p0.png,x\n")
        with pytest.raises(ValueError, match=r"metadata.csv' has no column 'file_name'; it has \['caption', 'file'\]"):
            load_source(str(tmp_path))


class TestTables:
    def test_images_beside_tables_in_a_folder_are_not_the_data(self, tmp_path):
        add_images(tmp_path / "assets", 5)
        (tmp_path / "data").mkdir()
        table().to_parquet(tmp_path / "data" / "train-0.parquet")
        table().select([0]).to_parquet(tmp_path / "data" / "test-0.parquet")
        assert (len(load_source(str(tmp_path))), len(load_source(str(tmp_path), "test"))) == (6, 1)
        with pytest.raises(ValueError, match=r"split: 'validation' is not in .*; it has \['test', 'train'\]"):
            load_source(str(tmp_path), "validation")

    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "parquet", "pattern", "folder"])
    def test_paths_are_those_of_files_beside(self, kind, streaming, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        folder = tmp_path / "data"
        add_images(folder / "images", 2)
        (tmp_path / "p9.png").write_bytes(png("blue"))
        rows = [{"image": "images/p0.png", "caption": "beside"}, {"image": str(tmp_path / "p9.png"), "caption": "absolute"},
                {"image": "p9.png", "caption": "beside the command"}]  # fmt: skip
        suffix = {"pattern": "csv", "folder": "jsonl"}.get(kind, kind)
        file = folder / f"rows.{suffix}"
        if suffix == "parquet":
            datasets.Dataset.from_list(rows).to_parquet(file)
        elif suffix == "csv":
            file.write_text("image,caption\n" + "".join(f"{row['image']},{row['caption']}\n" for row in rows))
        else:
            file.write_text(json.dumps(rows) if suffix == "json" else "\n".join(map(json.dumps, rows)))
        source = {"pattern": "data/*.csv", "folder": "data"}.get(kind, f"data/{file.name}")
        found, report = read(load_source(source, streaming=streaming))
        assert [(row.caption, row.image.getpixel((0, 0))) for row in found] == [
            ("beside", (255, 0, 0)), ("absolute", (0, 0, 255)),
        ]  # fmt: skip
        assert report.corrupt_image == 1 and f"{folder}/p9.png" in report.examples[0]

    def test_tables_of_several_folders(self, tmp_path):
        for number, color in enumerate(("red", "blue")):
            folder = tmp_path / f"part-{number}"
            folder.mkdir()
            (folder / "p.png").write_bytes(png(color))
            (folder / "rows.csv").write_text(f"image,caption\np.png,{color}\n")
        rows, _ = read(load_source(f"{tmp_path}/*/rows.csv"))
        assert [(row.caption, row.image.getpixel((0, 0))) for row in rows] == [
            ("red", (255, 0, 0)),
            ("blue", (0, 0, 255)),
        ]

    @pytest.mark.parametrize("streaming", [False, True])
    def test_bad_samples_of_a_tar(self, streaming, tmp_path):
        good = png("red")
        members = [("a.png", good), ("a.txt", b"one"), ("b.png", good), ("c.png", good), ("c.txt", "r\u00f6d".encode("latin-1")),
                   ("d.png", good), ("d.json", b"{broken"), ("e.jpg", png("red", form="JPEG")), ("e.json", b'{"caption": "five"}'),
                   ("f.txt", b"no image"), ("g.heic", b"?"), ("g.txt", b"seven")]  # fmt: skip
        write_tar(tmp_path / "shard.tar", members)
        rows, report = read(load_source(str(tmp_path / "shard.tar"), streaming=streaming))
        assert [(row.row, row.caption) for row in rows] == [(0, "one"), (4, "five")]
        assert (report.corrupt_image, report.empty_caption, report.unreadable_caption) == (2, 1, 1)
        assert report.unreadable_row == 1 and any("shard.tar/d.json: no JSON" in example for example in report.examples)
        assert any("shard.tar/c.png" in example for example in report.examples)
        content = (tmp_path / "shard.tar").read_bytes()
        (tmp_path / "shard.tar").write_bytes(content[:2600])
        with pytest.raises(ValueError, match=r"source: '.*shard.tar' is no tar that can be read to its end"):
            list(load_source(str(tmp_path / "shard.tar"), streaming=streaming))

    def test_a_changed_tar_is_read_again(self, tmp_path):
        for text in (b"one", b"two"):
            write_tar(tmp_path / "shard.tar", [("a.png", png("red")), ("a.txt", text)])
            assert [row.caption for row in read(load_source(str(tmp_path / "shard.tar")))[0]] == [text.decode()]


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.mark.filterwarnings("ignore:Image size")
def test_one_image_that_cannot_be_used_is_one_row(tmp_path):
    add_images(tmp_path)
    bomb, damaged = bytearray(png("red", (8, 8), form="BMP")), bytearray(png("red", (64, 64), form="BMP"))
    bomb[18:26] = struct.pack("<ii", 40_000, 40_000)
    damaged[20] = 0x40  # in the width
    (tmp_path / "bomb.bmp").write_bytes(bomb)
    (tmp_path / "damaged.bmp").write_bytes(damaged)
    for name in ("p0", "p1", "p2", "bomb", "damaged"):
        (tmp_path / f"{name}.txt").write_text(name)
    rows, report = read(load_source(str(tmp_path)))
    assert [row.caption for row in rows] == ["p0", "p1", "p2"]
    assert (report.used, report.corrupt_image) == (3, 2)
    assert f"({tmp_path}/bomb.bmp: " in report.examples[0] and f"({tmp_path}/damaged.bmp: " in report.examples[1]


@pytest.mark.parametrize("streaming", [False, True])
def test_sources_without_rows_are_named(streaming, tmp_path):
    features = datasets.Features(image=datasets.Image(), caption=datasets.Value("string"))
    empty = datasets.Dataset.from_dict({"image": [], "caption": []}, features=features)
    empty.to_parquet(tmp_path / "none.parquet")
    empty.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=empty, validation=table()).save_to_disk(tmp_path / "splits")
    (tmp_path / "folder").mkdir()
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "metadata.jsonl").write_text("")
    write_tar(tmp_path / "none.tar", [])
    for name, content in (("none.jsonl", ""), ("list.json", "[]"), ("none.csv", ""), ("head.csv", "image,caption\n")):
        (tmp_path / name).write_text(content)
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(ValueError, match=rf"source: '{path}' has no rows in split 'train'"):
            load_source(str(path), streaming=streaming)
    assert len(list(load_source(str(tmp_path / "splits"), "validation", streaming))) == 6


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bad.jsonl", b'{"a\n{"a'),
        ("bad.json", b'[{"a": 1}, {"a'),
        ("bad.parquet", b"nothing"),
        ("bad.csv", b'a,b\n3,4\n"1,2\n5,6'),
        ("bad.tar", b"nothing at all" * 1000),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_files_that_cannot_be_read_are_named(name, content, streaming, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"source: '{tmp_path}/{name}' (cannot be read|has no rows|is no tar)"):
        read(load_source(str(tmp_path / name), streaming=streaming))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "metadata.jsonl", "csv", "shards", "late"])
def test_damaged_lines_are_rows_to_skip(kind, streaming, tmp_path, monkeypatch):
    """In the first file and in a second one, and behind the rows that tell which columns there are."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("unified.data.lines._SAMPLES", 2)
    folder = tmp_path / "data"
    add_images(folder, 3)
    if kind == "csv":
        lines, bad = (
            ["image,caption,id", "p0.png,one,a", "p1.png,a,comma,b", "p2.png,three,c"],
            "4 fields, the header has 3",
        )
    else:
        lines, bad = (
            [json.dumps({"image": f"p{i}.png", "caption": c, "id": i}) for i, c in enumerate(("one", "two", "three"))],
            "no JSON",
        )
        lines[1] = lines[1][:-9]
        if kind == "late":
            lines = [lines[0]] * 4 + lines
    name = {"csv": "rows.csv", "metadata.jsonl": "metadata.jsonl"}.get(kind, "rows-1.jsonl")
    (folder / name).write_text(
        "\n".join(lines).replace('image"', 'file_name"' if name == "metadata.jsonl" else 'image"')
    )
    source = folder if kind == "metadata.jsonl" else folder / name
    if kind == "shards":
        (folder / "rows-0.jsonl").write_text(lines[2] + "\n\n" + lines[0])
        source = folder / "rows-*.jsonl"
    rows, report = read(load_source(str(source), streaming=streaming))
    expected = {"shards": ["three", "one", "one", "three"], "late": ["one"] * 5 + ["three"]}.get(kind, ["one", "three"])
    assert [row.caption for row in rows] == expected and rows[-1].image.size == (8, 8)
    assert (report.unreadable_row, report.skipped) == (1, 1)
    place = {"shards": 3, "late": 5}.get(kind, 1)
    line = {"late": 6, "csv": 3}.get(kind, 2)
    assert report.examples[0].startswith(f"row {place}: unreadable row ({folder}/{name}, line {line}: {bad}")
    found = list(captions(load_source(str(source), streaming=streaming), report := SkipReport()))
    assert (found, report.unreadable_row) == (expected, 1)


@pytest.mark.parametrize("line", ["5", "[1]", "null", r'{"caption": "\ud800"}', "[" * 100_000, "\x00\xff"])
@pytest.mark.parametrize("streaming", [False, True])
def test_lines_that_are_no_rows(line, streaming, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "rows.jsonl").write_text('{"caption": "one"}\n' + line + '\n{"caption": "three", "size": NaN}\n')
    found = list(captions(load_source(str(tmp_path / "rows.jsonl"), streaming=streaming), report := SkipReport()))
    assert (found, report.skipped) == (["one", "three"], 1)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_damaged_header_of_a_tar_is_a_row_to_skip(streaming, tmp_path):
    """Members behind it are found again; those of the same sample are named, too."""
    members = [
        (f"{name}.{suffix}", png("red") if suffix == "png" else name.encode())
        for name in "abc"
        for suffix in ("png", "txt")
    ]
    write_tar(tmp_path / "shard.tar", members)
    with tarfile.open(tmp_path / "shard.tar") as tar:
        place = tar.getmember("b.png").offset
    content = bytearray((tmp_path / "shard.tar").read_bytes())
    content[place : place + 64] = bytes(range(100, 164))
    (tmp_path / "shard.tar").write_bytes(content)
    rows, report = read(load_source(str(tmp_path / "shard.tar"), streaming=streaming))
    assert [row.caption for row in rows] == ["a", "c"]
    assert report.examples == [
        f"row 1: unreadable row ({tmp_path}/shard.tar: a damaged header at byte {place})",
        "row 2: corrupt image (there is no image)",
    ]


def test_streams_that_do_not_know_their_columns():
    """Such a stream gives decoded images; a broken row between them is one row."""

    def rows():
        yield {"image": Image.new("RGB", (8, 8), "red"), "caption": "one"}
        yield {"image": None, "caption": "two"}
        yield {"image": Image.new("RGBA", (8, 8), (255, 0, 0, 0)), "caption": "three"}

    found, report = read(datasets.IterableDataset.from_generator(rows))
    assert [(row.caption, row.image.getpixel((0, 0))) for row in found] == [
        ("one", (255, 0, 0)), ("three", (255, 255, 255)),
    ]  # fmt: skip
    assert report.examples == ["row 1: corrupt image (there is no image)"]


def test_columns_without_images_are_named(tmp_path):
    source = datasets.Dataset.from_dict({"image": [1, 2], "caption": ["a", "b"]})
    with pytest.raises(ValueError, match="image_column: 'image' holds no images, but Value"):
        read(source)
