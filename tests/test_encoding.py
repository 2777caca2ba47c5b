"""Codes caches: views, blocks, resume after a kill, streaming, several processes."""

import json
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import unified.data.encoding
from unified.data.code_cache import encode_source, load_codes
from unified.data.crops import Views, cover, nearest_aspect
from unified.data.sources import open_rgb
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
        assert cover(ramp(20, 60), (12, 24)).size == (36, 12)

    @pytest.mark.parametrize(("options", "message"), [
        ({"sizes": ()}, "sizes: "), ({"crop": "middle"}, "crop: 'middle' is unknown"), ({"count": 2}, "count: 2 must be"),
        ({"zoom": 0.5}, "zoom: 0.5 must be at least 1"),
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
        rows.append({"image": image, "caption": f"picture {i}", "id": None if i == 4 else f"id-{i}"})
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
    pictures = datasets.load_dataset("parquet", data_files=mixed_source)["train"]
    for row in rows:
        views = list(VIEWS(open_rgb(pictures[row["source_row"]]["image"]), row["source_row"]))
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
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2,
               "recipes/encode_images.py", "--image-tokenizer", tmp_path / "tokenizer",
               "--source", *([f"file://{mixed_source}", "--streaming"] if streamed else [mixed_source]),
               "--splits", "train", "--block-rows", 2, "--buckets", "16x16", "12x24", "24x12", "--crop", "random",
               "--crops", 2, "--flips", "--out", tmp_path / "two"]  # fmt: skip
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("9 rows used") == 1
    encode(image_tokenizer, mixed_source, tmp_path / "one", block_rows=2)
    assert rows_of(tmp_path / "two") == rows_of(tmp_path / "one")


def test_bad_input_is_named(image_tokenizer, mixed_source, tmp_path):
    with pytest.raises(ValueError, match="image_size: 12x18 does not divide by the tokenizer's stride 4"):
        encode_source(image_tokenizer, mixed_source, tmp_path / "x", ("train",), views=Views(((12, 18),)))
    with pytest.raises(ValueError, match="block_rows, batch_size: 0 and 3 must be at least 1"):
        encode(image_tokenizer, mixed_source, tmp_path / "x", block_rows=0)
    row = {"image": {"bytes": b"no image", "path": None}, "caption": "a caption"}
    empty = datasets.Dataset.from_list([row]).cast_column("image", datasets.Image(decode=False))
    empty.to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(ValueError, match="no usable row in split 'train'"):
        encode(image_tokenizer, str(tmp_path / "empty.parquet"), tmp_path / "x")
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.partial").exists()
