"""Codes caches: views, blocks, resume after a kill, streaming, several processes."""

import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import tarfile
import weakref
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from forking import torchrun
from PIL import Image

import unified.data.code_cache
import unified.data.encoding
import unified.data.rows
from unified.data import open_rgb
from unified.data.code_cache import encode_source, load_codes, source_changed
from unified.data.crops import Views, nearest_aspect
from unified.data.interleaved import encode_interleaved
from unified.training.config import load_config
from unified.training.loop import train
from unified_tokenizers.images import to_tensor

ROOT = Path(__file__).resolve().parent.parent


def ramp(height, width):
    """An image whose red is its row and whose green is its column."""
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    return Image.fromarray(np.stack([rows, columns, np.zeros_like(rows)], -1).astype(np.uint8))


class TestViews:
    def test_ten_crop_corners_centre_and_mirrors(self):
        image = ramp(20, 20)
        views = list(Views(((16, 16),), crop="ten", zoom=1.25)(image, 0))
        corners = [view.getpixel((0, 0))[:2] for view in views[::2]]
        assert corners == [(0, 0), (0, 4), (4, 0), (4, 4), (2, 2)]
        assert all(
            np.array_equal(np.asarray(m), np.asarray(v)[:, ::-1]) for v, m in zip(views[::2], views[1::2], strict=True)
        )

    def test_random_crops_depend_on_seed_and_row_alone(self):
        views = Views(((16, 16),), crop="random", count=3, zoom=1.5, seed=1)
        first = [np.asarray(view) for view in views(ramp(40, 30), 7)]
        again = [np.asarray(view) for view in views(ramp(40, 30), 7)]
        other = [np.asarray(view) for view in views(ramp(40, 30), 8)]
        assert len(first) == 3 and all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
        assert not np.array_equal(first[0], first[1]) and not np.array_equal(first[0], other[0])

    def test_buckets_by_aspect(self):
        sizes = ((16, 16), (12, 24), (24, 12))
        assert [nearest_aspect(ramp(h, w), sizes) for h, w in ((30, 33), (20, 60), (90, 40))] == [
            (16, 16),
            (12, 24),
            (24, 12),
        ]
        (view,) = Views(sizes)(ramp(20, 60), 0)
        assert view.size == (24, 12)

    @pytest.mark.parametrize(("options", "message"), [
        ({"sizes": ()}, "sizes: "), ({"crop": "middle"}, "crop: 'middle' is unknown"), ({"count": 2}, "count: 2 must be"),
        ({"zoom": 0.5}, "zoom: 0.5 must be a finite number of at least 1"),
    ])  # fmt: skip
    def test_bad_views_are_named(self, options, message):
        with pytest.raises(ValueError, match=message):
            Views(**{"sizes": ((16, 16),), **options})


def rows_of(folder, split="train"):
    rows = datasets.load_from_disk(folder)[split]
    return [{name: value for name, value in row.items()} for row in rows]


@pytest.fixture
def mixed_source(tmp_path):
    """Ten images of several sizes with ids; one is broken, one has no id."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(10):
        height, width = [(16, 16), (12, 30), (30, 12)][i % 3]
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        rows.append({"image": image, "caption": f"image {i}", "id": None if i == 4 else f"id-{i}"})
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image(decode=False))
    broken = table.to_list()
    broken[6]["image"]["bytes"] = b"broken"
    datasets.Dataset.from_list(broken).cast_column("image", datasets.Image(decode=False)).to_parquet(
        tmp_path / "p.parquet"
    )
    return str(tmp_path / "p.parquet")


VIEWS = Views(((16, 16), (12, 24), (24, 12)), crop="random", count=2, flips=True)


def encode(tokenizer, source, out, **options):
    return encode_source(
        tokenizer, source, out, ("train",), views=VIEWS, **{"batch_size": 3, "block_rows": 4, **options}
    )


def test_views_become_rows_in_order(image_tokenizer, mixed_source, tmp_path):
    report = encode(image_tokenizer, mixed_source, tmp_path / "codes")["train"]
    assert (report.used, report.corrupt_image) == (9, 1) and "row 6: corrupt image" in report.summary()
    rows = rows_of(tmp_path / "codes")
    assert [(row["source_row"], row["view"]) for row in rows] == [(i, v) for i in range(10) if i != 6 for v in range(4)]
    images = datasets.load_dataset("parquet", data_files=mixed_source)["train"]
    for row in rows:
        views = list(VIEWS(open_rgb(images[row["source_row"]]["image"]), row["source_row"]))
        expected = image_tokenizer.encode(to_tensor([views[row["view"]]]))[0]
        assert torch.equal(torch.tensor(row["codes"]).reshape(row["height"], row["width"]), expected.int())
        assert row["id"] == (None if row["source_row"] == 4 else f"id-{row['source_row']}")
    assert {(row["height"], row["width"]) for row in rows} == {(4, 4), (3, 6), (6, 3)}
    description = json.loads((tmp_path / "codes" / "codes.json").read_text())
    assert description["tokenizer_fingerprint"] == image_tokenizer.fingerprint
    assert description["views"]["sizes"] == [[16, 16], [12, 24], [24, 12]]
    assert len(load_codes(tmp_path / "codes", "train", image_tokenizer.fingerprint)) == 36


@pytest.mark.parametrize("options", [{"block_rows": 100}, {"streaming": True}, {"batch_size": 64}])
def test_blocks_streaming_and_batches_do_not_matter(image_tokenizer, mixed_source, tmp_path, options):
    encode(image_tokenizer, mixed_source, tmp_path / "a")
    encode(image_tokenizer, mixed_source, tmp_path / "b", **options)
    assert rows_of(tmp_path / "a") == rows_of(tmp_path / "b")


def test_a_killed_run_goes_on_without_loss_or_duplicates(image_tokenizer, mixed_source, tmp_path, monkeypatch):
    encode(image_tokenizer, mixed_source, tmp_path / "whole")
    write, written = unified.data.encoding._write, []

    def killed(file, *rest):
        if len(written) == 2:
            file.with_suffix(".partial").write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(file)
        write(file, *rest)

    monkeypatch.setattr(unified.data.encoding, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        encode(image_tokenizer, mixed_source, tmp_path / "codes")
    assert not (tmp_path / "codes").exists()
    with pytest.raises(ValueError, match=r"was made with other settings \(block_rows: 4 then, 5 now\); set them back"):
        encode(image_tokenizer, mixed_source, tmp_path / "codes", block_rows=5)
    monkeypatch.setattr(unified.data.encoding, "_write", lambda file, *rest: (written.append(file), write(file, *rest)))
    report = encode(image_tokenizer, mixed_source, tmp_path / "codes")["train"]
    assert [file.name for file in written] == [
        f"block-{b:08d}.arrow" for b in range(3)
    ]  # the first two were not made again
    assert rows_of(tmp_path / "codes") == rows_of(tmp_path / "whole")
    assert (report.used, report.corrupt_image) == (9, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["codes", "p.parquet", "whole"]


@pytest.mark.process
@pytest.mark.parametrize("streamed", [False, True])
def test_two_processes_equal_one(image_tokenizer, mixed_source, tmp_path, streamed):
    """The recipe in two processes on one source, and the function alone; each row is encoded once."""
    image_tokenizer.save_pretrained(tmp_path / "tokenizer")
    given = ["--image-tokenizer", tmp_path / "tokenizer",
             "--source", *([f"file://{mixed_source}", "--streaming"] if streamed else [mixed_source]),
             "--splits", "train", "--block-rows", 2, "--buckets", "16x16", "12x24", "24x12", "--crop", "random",
             "--crops", 2, "--flips", "--out", tmp_path / "two"]  # fmt: skip
    done = torchrun(2, "recipes/encode_images.py", *given)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("9 rows used") == 1
    encode(image_tokenizer, mixed_source, tmp_path / "one", block_rows=2)
    assert rows_of(tmp_path / "two") == rows_of(tmp_path / "one")


def test_bad_input_is_named(image_tokenizer, mixed_source, tmp_path):
    with pytest.raises(ValueError, match="image_size: 12x18 does not divide by the tokenizer's stride 4"):
        encode_source(image_tokenizer, mixed_source, tmp_path / "x", ("train",), views=Views(((12, 18),)))
    with pytest.raises(ValueError, match="block_rows, batch_size: 0 and 3 must be whole numbers of at least 1"):
        encode(image_tokenizer, mixed_source, tmp_path / "x", block_rows=0)
    row = {"image": {"bytes": b"no image", "path": None}, "caption": "a caption"}
    empty = datasets.Dataset.from_list([row]).cast_column("image", datasets.Image(decode=False))
    empty.to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(ValueError, match="no usable row in split 'train'"):
        encode(image_tokenizer, str(tmp_path / "empty.parquet"), tmp_path / "x")
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.partial").exists()


class TestContent:
    """A cache knows what it was made from."""

    KINDS = ("folder", "csv", "jsonl", "parquet", "saved", "tar", "interleaved")

    @pytest.fixture(params=KINDS)
    def source(self, request, tmp_path):
        return self.make(request.param, tmp_path / "source")

    def make(self, kind, folder):
        """A kind of source, its path, and a function that changes one of its captions or one of its images."""
        folder.mkdir()
        state = {"captions": ["a", "b", "c"], "colors": ["red", "green", "blue"]}

        def put(name, content):
            """Write a file unless it holds this already."""
            if not (folder / name).exists() or (folder / name).read_bytes() != content:
                (folder / name).write_bytes(content)

        def write():
            rows = [(f"p{number}.png", *row) for number, row in enumerate(zip(*state.values(), strict=True))]
            images = [Image.new("RGB", (16, 16), color) for color in state["colors"]]
            if kind in ("saved", "parquet"):
                table = datasets.Dataset.from_dict({"image": images, "caption": state["captions"]})
                table = table.cast_column("image", datasets.Image())
                shutil.rmtree(folder)
                table.save_to_disk(folder) if kind == "saved" else table.to_parquet(folder / "rows.parquet")
                return
            content = {}
            for (name, caption, _), image in zip(rows, images, strict=True):
                buffer = io.BytesIO()
                image.save(buffer, "PNG")
                content |= {name: buffer.getvalue(), name.replace("png", "txt"): caption.encode()}
            if kind == "tar":
                with tarfile.open(folder / "rows.tar", "w") as tar:
                    for name, data in content.items():
                        member = tarfile.TarInfo(name)
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
                return
            for name, data in content.items():
                if kind == "folder" or name.endswith("png"):
                    put(name, data)
            lines = {
                "folder": [],
                "csv": ["image,caption", *(f"{name},{caption}" for name, caption, _ in rows)],
                "jsonl": [json.dumps({"image": name, "caption": caption}) for name, caption, _ in rows],
                "interleaved": [
                    json.dumps({"segments": [{"text": caption, "image": None}, {"text": None, "image": name}]})
                    for name, caption, _ in rows
                ],
            }[kind]
            if lines:
                put("rows.csv" if kind == "csv" else "rows.jsonl", "\n".join(lines).encode())

        def change(name, value):
            state[name][1] = value
            write()

        write()
        file = {"folder": "", "saved": "", "interleaved": "/rows.jsonl"}.get(kind, f"/rows.{kind}")
        return kind, str(folder) + file, change

    def encode(self, tokenizer, kind, source, out, **options):
        if kind == "interleaved":
            return encode_interleaved(tokenizer, source, out, ("train",), ((16, 16),), **options)
        return encode_source(tokenizer, source, out, ("train",), image_size=16, **options)

    @pytest.mark.process
    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("changed", [("captions", "z"), ("colors", "white")])
    def test_changes_are_noticed(self, source, streaming, changed, image_tokenizer, tmp_path):
        kind, source, change = source
        self.encode(image_tokenizer, kind, source, tmp_path / "codes", streaming=streaming)
        assert not source_changed(tmp_path / "codes")
        change(*changed)
        # The images that a streamed table names are not looked at before they are read.
        unseen = streaming and kind in ("csv", "jsonl", "interleaved") and changed[0] == "colors"
        assert source_changed(tmp_path / "codes") != unseen
        self.encode(image_tokenizer, kind, source, tmp_path / "codes", streaming=streaming)
        assert not source_changed(tmp_path / "codes")

    @pytest.mark.process
    def test_another_process_sees_the_same(self, image_tokenizer, tmp_path):
        """The digest holds nothing that differs between two starts."""
        for kind in self.KINDS:
            self.encode(image_tokenizer, *self.make(kind, tmp_path / kind)[:2], tmp_path / "codes" / kind)
        code = """
import sys
from pathlib import Path
from unified.data.code_cache import source_changed
print(sorted((folder.name, source_changed(folder)) for folder in Path(sys.argv[1]).iterdir()))
"""
        environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "another cache")}
        command = [sys.executable, "-c", code, tmp_path / "codes"]
        done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == str([(kind, False) for kind in sorted(self.KINDS)])

    def test_a_source_that_is_gone_leaves_the_codes(self, image_tokenizer, mixed_source, tmp_path):
        encode(image_tokenizer, mixed_source, tmp_path / "codes")
        Path(mixed_source).unlink()
        assert not source_changed(tmp_path / "codes")

    def test_a_begun_cache_of_other_images_is_begun_again(self, image_tokenizer, tmp_path, monkeypatch):
        for number in range(8):
            Image.new("RGB", (16, 16), (number * 30, 0, 0)).save(tmp_path / f"{number}.png")
            (tmp_path / f"{number}.txt").write_text(f"before {number}")
        write, calls = unified.data.encoding._write, []

        def killed(*arguments):
            calls.append(arguments)
            if len(calls) == 2:
                raise KeyboardInterrupt
            write(*arguments)

        monkeypatch.setattr(unified.data.encoding, "_write", killed)
        options = {"image_size": 16, "block_rows": 4}
        with pytest.raises(KeyboardInterrupt):
            encode_source(image_tokenizer, str(tmp_path), tmp_path / "out" / "codes", ("train",), **options)
        (tmp_path / "0.txt").write_text("after 0")
        monkeypatch.setattr(unified.data.encoding, "_write", write)
        with pytest.warns(UserWarning, match="was begun with other images or captions"):
            encode_source(image_tokenizer, str(tmp_path), tmp_path / "out" / "codes", ("train",), **options)
        captions = [row["caption"] for row in rows_of(tmp_path / "out" / "codes")]
        assert captions == ["after 0", *(f"before {number}" for number in range(1, 8))]

    @pytest.mark.process
    def test_a_run_encodes_changed_images_again(self, config_file, image_tokenizer, tmp_path):
        images = tmp_path / "images"
        images.mkdir()
        for number in range(4):
            Image.new("RGB", (16, 16), (number * 60, 0, 0)).save(images / f"{number}.png")
            (images / f"{number}.txt").write_text("red apple")
        options = [
            f"output_dir={tmp_path}/run",
            f"data.train={images}",
            "validate_every=null",
            "checkpoint_every=null",
            "steps=4",
        ]
        train(load_config(config_file, options))
        (images / "0.txt").write_text("blue car")
        Image.new("RGB", (16, 16), "blue").save(images / "9.png")
        (images / "9.txt").write_text("a cat")
        train(load_config(config_file, options))
        captions = [row["caption"] for row in rows_of(tmp_path / "run" / "codes")]
        assert captions == ["blue car", *["red apple"] * 3, "a cat"]
        before = (tmp_path / "run" / "codes" / "codes.json").stat().st_mtime_ns
        train(load_config(config_file, options))
        assert (tmp_path / "run" / "codes" / "codes.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("streaming", [False, True])
def test_only_so_many_rows_are_read(image_tokenizer, streaming, tmp_path, monkeypatch):
    """A stream is not read any further; the images behind the last row are never opened."""
    lines = [json.dumps({"image": f"{number}.png", "caption": f"image {number}"}) for number in range(50)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    for number in range(50):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(tmp_path / f"{number}.png")
    opened, original = [], unified.data.rows.open_rgb
    monkeypatch.setattr(unified.data.rows, "open_rgb", lambda value: opened.append(value) or original(value))
    source = str(tmp_path / "rows.jsonl")
    options = {"image_size": 16, "streaming": streaming, "max_rows": 3, "block_rows": 2}
    report = encode_source(image_tokenizer, source, tmp_path / "codes", ("train",), **options)["train"]
    assert report.used == len(opened) == 3
    assert [row["caption"] for row in rows_of(tmp_path / "codes")] == [f"image {number}" for number in range(3)]
    lines[9] = lines[9].replace("image 9", "changed")
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    assert source_changed(tmp_path / "codes") == streaming  # of a stream, its files are compared
    with pytest.raises(ValueError, match="max_rows: 0 must be a whole number of at least 1"):
        encode_source(image_tokenizer, source, tmp_path / "codes", ("train",), max_rows=0)


def test_an_endless_stream_is_read_as_far_as_it_is_needed(image_tokenizer, tmp_path, monkeypatch):
    read = []

    def endless():
        for number in itertools.count():
            read.append(number)
            yield {"image": Image.new("RGB", (16, 16), (number, 0, 0)), "caption": f"image {number}"}

    features = datasets.Features(image=datasets.Image(), caption=datasets.Value("string"))
    stream = datasets.IterableDataset.from_generator(endless, features=features)
    monkeypatch.setattr(unified.data.code_cache, "load_source", lambda *_: stream)
    encode_source(image_tokenizer, "endless", tmp_path / "codes", ("train",), image_size=16, streaming=True, max_rows=5)
    assert len(rows_of(tmp_path / "codes")) == 5 and max(read) <= 5


def test_rows_of_a_stream_are_not_collected(tmp_path):
    """A block of rows is passed on row by row, so that memory holds none of their images."""
    alive = []

    class Row(dict):
        def __init__(self):
            alive.append(weakref.ref(self))

    numbers, most = [], 0
    for block, numbered in unified.data.encoding._blocks((Row() for _ in range(20)), 8, 1, 2, tmp_path):
        assert block == 1
        for number, row in numbered:
            del row
            numbers.append(number)
            most = max(most, sum(reference() is not None for reference in alive))
    assert numbers == list(range(8, 16)) and most <= 4


@pytest.mark.parametrize("several", [False, True])
def test_a_missing_split_is_told_before_anything_is_encoded(config_file, several, tmp_path):
    for number in range(2):
        Image.new("RGB", (16, 16), "red").save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("red apple")
    options = [f"output_dir={tmp_path}/run", f"data.train={tmp_path}"]
    if several:
        parts = f"{{path: {tmp_path}}}, {{path: {tmp_path}, validation_split: validation}}"
        options = [options[0], "data.train=null", f"data.sources=[{parts}]"]
    with pytest.raises(ValueError, match=r"split: 'validation' is not in"):
        train(load_config(config_file, options))
    assert [path.name for path in (tmp_path / "run").iterdir()] == []


@pytest.mark.process
def test_two_writers_of_one_cache_are_refused(image_tokenizer, mixed_source, tmp_path):
    """Another process holds the begun cache; a lock that it leaves behind stops nobody."""
    begun = tmp_path / "codes.partial"
    code = "import sys, time\nfrom unified.locks import locked\nwith locked(sys.argv[1]):\n print(flush=True)\n time.sleep(99)"
    child = subprocess.Popen([sys.executable, "-c", code, begun], stdout=subprocess.PIPE, cwd=ROOT)
    child.stdout.readline()
    try:
        with pytest.raises(ValueError, match=rf"out: '.*codes.partial' is in use by process {child.pid} on "):
            encode(image_tokenizer, mixed_source, tmp_path / "codes")
    finally:
        child.kill()
        child.wait()
    assert [path.name for path in begun.iterdir()] == [".lock"]
    encode(image_tokenizer, mixed_source, tmp_path / "codes")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["codes", "p.parquet"]
