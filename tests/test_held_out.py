"""A share that is held out by content: the same rows in every run, and nothing of them on the other side."""

import datasets
import numpy as np
import pytest
from PIL import Image

from unified.data.code_cache import encode_source, load_codes, source_changed
from unified.data.held_out import part_names, part_of
from unified.data.sources import check_splits, load_source
from unified.training.config import load_config
from unified.training.loop import train

REST, HELD_OUT = part_names("train", 0.3)


def write_images(folder, numbers, prefix=""):
    """An image of 16 px and a caption for each number; equal numbers are equal images."""
    folder.mkdir(exist_ok=True)
    for place, number in enumerate(numbers):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{prefix}{place:03d}.png")
        (folder / f"{prefix}{place:03d}.txt").write_text(f"image {number}")
    return str(folder)


def numbers(rows) -> list[str]:
    return [row["caption"] for row in rows.remove_columns("image")]


def test_names():
    assert (REST, HELD_OUT) == ("train.rest_0.3", "train.held_out_0.3")
    assert part_of("my.split.held_out_0.25") == ("my.split", 0.25, True) and part_of(REST) == ("train", 0.3, False)
    assert part_of("train") is None and part_of("held_out_0.1") is None
    for share in (0.0, 1.0, -0.1, float("nan"), 1e-9):
        with pytest.raises(ValueError, match="validation: a share of"):
            part_names("train", share)


@pytest.mark.process
def test_every_row_is_on_one_side_and_equal_images_on_the_same(tmp_path):
    source = write_images(tmp_path / "a", [*range(200), *range(50)])
    rest, held_out = numbers(load_source(source, REST)), numbers(load_source(source, HELD_OUT))
    assert sorted(rest + held_out) == sorted(numbers(load_source(source)))
    assert not set(rest) & set(held_out)
    assert 0.2 < len(set(held_out)) / 200 < 0.4  # four deviations and more
    # Other names, another order, more images, another folder: an image stays on its side.
    again = write_images(tmp_path / "b", [*range(150, 220), *range(90)], prefix="x")
    more = set(numbers(load_source(again, HELD_OUT)))
    known = {f"image {number}" for number in [*range(90), *range(150, 200)]}
    assert more & known == set(held_out) & known


@pytest.mark.process
def test_tables_and_streams_agree(tmp_path):
    source = write_images(tmp_path / "a", range(40))
    rows = load_source(source)
    rows.to_parquet(tmp_path / "table.parquet")
    paths = [str(tmp_path / "a" / f"{number:03d}.png") for number in range(40)]
    datasets.Dataset.from_dict({"image": paths, "caption": rows["caption"]}).to_csv(tmp_path / "table.csv")
    expected = numbers(load_source(source, HELD_OUT))
    assert 3 < len(expected) < 25
    for name in ("table.parquet", "table.csv"):
        for streaming in (False, True):
            assert numbers(load_source(str(tmp_path / name), HELD_OUT, streaming)) == expected


def test_texts_are_told_by_their_text(tmp_path):
    texts = [f"text {number % 30}" for number in range(60)]
    datasets.Dataset.from_dict({"id": list(range(60)), "text": texts}).to_parquet(tmp_path / "texts.parquet")
    parts = [
        load_source(str(tmp_path / "texts.parquet"), name, content_column="text")["text"] for name in (REST, HELD_OUT)
    ]
    assert sorted([*parts[0], *parts[1]]) == sorted(texts) and not set(parts[0]) & set(parts[1])
    with pytest.raises(ValueError, match="validation: 'image' is not a column"):
        load_source(str(tmp_path / "texts.parquet"), REST)


def test_too_small_a_share(tmp_path):
    source = write_images(tmp_path / "a", [1, 2])
    with pytest.raises(ValueError, match=r"none of the 2 rows lies in the share of 0.001"):
        load_source(source, "train.held_out_0.001")


def test_a_cache_of_both_sides(tmp_path, image_tokenizer):
    source = write_images(tmp_path / "a", range(12))
    encode_source(image_tokenizer, source, tmp_path / "codes", image_size=16, validation=0.3)
    sides = {split: list(load_codes(tmp_path / "codes", split, None)["caption"]) for split in ("train", "validation")}
    assert sides["validation"] == numbers(load_source(source, HELD_OUT))
    assert sides["train"] == numbers(load_source(source, REST))
    assert not source_changed(tmp_path / "codes")
    write_images(tmp_path / "a", [99], prefix="new")
    assert source_changed(tmp_path / "codes")


def test_one_split_is_not_held_out_from_itself(tmp_path, image_tokenizer):
    load_source(write_images(tmp_path / "a", range(3))).to_parquet(tmp_path / "table.parquet")
    table = str(tmp_path / "table.parquet")
    with pytest.raises(
        ValueError, match=r"splits: .*table.parquet' has one split, so that 'validation' would be the rows"
    ):
        encode_source(image_tokenizer, table, tmp_path / "codes", image_size=16)
    check_splits(table, "train", "train", "x")  # said, not implied
    check_splits(table, REST, HELD_OUT, "x")
    check_splits(str(tmp_path / "a"), "train", "validation", "x")  # a folder says itself that it lacks a split


@pytest.mark.process
def test_a_run_holds_out_what_it_says(config_file, tmp_path):
    source = write_images(tmp_path / "a", range(12))
    settings = [
        f"output_dir={tmp_path}/run",
        f"data.train={source}",
        "steps=2",
        "validate_every=1",
        "checkpoint_every=null",
    ]
    settings += ["schedule.patch_sizes=[1]", "schedule.shares=[1.0]", "data.image_size=16"]
    with pytest.raises(ValueError, match="split: 'validation' is not in"):
        train(load_config(config_file, settings))
    train(load_config(config_file, [*settings, "data.validation=0.3"]))
    trained = set(load_codes(tmp_path / "run" / "codes", REST, None)["caption"])
    held_out = set(load_codes(tmp_path / "run" / "codes-validation", HELD_OUT, None)["caption"])
    assert held_out == set(numbers(load_source(source, HELD_OUT))) and len(trained) + len(held_out) == 12
    assert not trained & held_out
    with pytest.raises(ValueError, match=r"splits: \['train.rest_0.3'\] then, \['train.rest_0.2'\] now"):
        train(load_config(config_file, [*settings, "data.validation=0.2"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.validation=1.5"], "validation: a share of 1.5"),
        (
            ["data.validation=0.1", "data.validation_split=test"],
            "data.validation: a share, and data.validation_split is",
        ),
        (["data.train=null", "data.sources=[{path: a, validation: 0}]"], "validation: a share of 0.0"),
        (["data.train=null", "data.sources=[{path: a, validation: 0.1, validation_split: b}]"], "leave one out"),
    ],
)
def test_shares_that_are_refused(config_file, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_config(config_file, [f"output_dir={tmp_path}", *changes])


def test_codes_are_not_split_again(config_file, tmp_path):
    with pytest.raises(ValueError, match="holds codes already, of which a share cannot be told"):
        train(load_config(config_file, [f"output_dir={tmp_path}", "data.validation=0.1"]))
