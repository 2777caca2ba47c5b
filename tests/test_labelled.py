"""Images with classes: encoded without captions, and as sequences of a class-conditional model."""

import io
import tarfile

import datasets
import numpy as np
import pytest
from conftest import tiny_config
from PIL import Image

from unified.data.batches import Batches, Source, first_views
from unified.data.code_cache import load_codes
from unified.data.crops import Views, center_cover
from unified.data.labelled import encode_labelled, labelled_sequence, with_classes
from unified.data.rows import class_names

VIEWS = Views(((16, 16),))


def pictures(count, seed=0):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(count)]


def folder_of(path, classes, count=2):
    """An image folder with a folder for each class."""
    for number, name in enumerate(classes):
        (path / name).mkdir(parents=True)
        for index, image in enumerate(pictures(count, number)):
            image.save(path / name / f"{index}.png")
    return path


def source_of(path, labels, kind=None):
    rows = datasets.Dataset.from_dict({"image": pictures(len(labels)), "label": labels})
    rows = rows.cast_column("image", datasets.Image())
    (rows if kind is None else rows.cast_column("label", kind)).save_to_disk(path)
    return str(path)


class TestEncoding:
    @pytest.mark.parametrize("streaming", [False, True])
    def test_a_folder_for_each_class(self, image_tokenizer, tmp_path, streaming):
        folder_of(tmp_path / "data" / "train", ["n02", "n01", "n03"])
        names = {"n01": "tench, n01", "n02": "crane, n02", "n03": "crane, n03"}
        encode_labelled(
            image_tokenizer,
            str(tmp_path / "data"),
            tmp_path / "codes",
            VIEWS,
            ("train",),
            streaming=streaming,
            names=names,
        )
        rows = load_codes(tmp_path / "codes", "train", image_tokenizer.fingerprint, "labelled")
        assert class_names(rows, "label") == ["tench, n01", "crane, n02", "crane, n03"]
        assert [int(row["label"]) for row in rows] == [0, 0, 1, 1, 2, 2]
        with pytest.raises(ValueError, match="holds labelled rows, not captioned ones"):
            load_codes(tmp_path / "codes", "train", None)
        with pytest.raises(ValueError, match="class names: the class 'n02' of the source has none; add it"):
            encode_labelled(
                image_tokenizer, str(tmp_path / "data"), tmp_path / "o", VIEWS, ("train",), names={"n01": "a"}
            )

    @pytest.mark.parametrize("kind", [None, datasets.ClassLabel(names=["cat", "dog", "fox"])])
    def test_rows_without_a_class_are_named(self, image_tokenizer, tmp_path, kind):
        source = source_of(tmp_path / "data", [0, None, 2, -1], kind)
        report = encode_labelled(image_tokenizer, source, tmp_path / "codes", VIEWS, ("train",))["train"]
        assert (report.used, report.missing_class) == (2, 2)
        assert report.examples[0] == "row 1: missing class (None is not the number of a class)"
        assert report.examples[1].startswith("row 3: missing class (-1 is not one of the")
        rows = load_codes(tmp_path / "codes", "train", None, "labelled")
        assert [int(row["label"]) for row in rows] == [0, 2]

    @pytest.mark.parametrize("streaming", [False, True])
    def test_classes_in_a_tar(self, image_tokenizer, tmp_path, streaming):
        """WebDataset keeps them as digits in their own files."""
        with tarfile.open(tmp_path / "shard.tar", "w") as tar:
            for number, (image, label) in enumerate(zip(pictures(3), (b"2", b"none", b"0"), strict=True)):
                png = io.BytesIO()
                image.save(png, format="PNG")
                for suffix, content in (("png", png.getvalue()), ("cls", label)):
                    member = tarfile.TarInfo(f"{number}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        report = encode_labelled(
            image_tokenizer, str(tmp_path / "shard.tar"), tmp_path / "codes", VIEWS, ("train",), class_column="cls",
            streaming=streaming,
        )["train"]  # fmt: skip
        assert (report.used, report.missing_class) == (
            2,
            1,
        ) and "'none' is not the number of a class" in report.examples[0]
        assert [int(row["label"]) for row in load_codes(tmp_path / "codes", "train", None, "labelled")] == [2, 0]

    @pytest.mark.parametrize(
        ("labels", "column", "message"),
        [
            (["cat", "dog"], "label", "class_column: 'label' holds string, not classes"),
            ([0, 1], "kind", "class_column: 'kind' is not a column of the source; it has"),
            ([None, -1], "label", "no usable row in split 'train' .* 2 missing classes"),
        ],
    )
    def test_bad_columns_are_named(self, image_tokenizer, tmp_path, labels, column, message):
        source = source_of(tmp_path / "data", labels)
        with pytest.raises(ValueError, match=message):
            encode_labelled(image_tokenizer, source, tmp_path / "codes", VIEWS, ("train",), class_column=column)

    def test_a_cache_with_holes_is_refused(self, image_tokenizer, tmp_path):
        encode_labelled(image_tokenizer, source_of(tmp_path / "data", [0, 1, 1]), tmp_path / "codes", VIEWS, ("train",))
        whole = datasets.load_from_disk(str(tmp_path / "codes"))["train"].with_format(None)
        for labels, message in (([0, -1, 1], "1 rows of .* a negative label, the first is row 1"),
                                ([0, 1, None], "1 rows of .* have no label, the first is row 2")):  # fmt: skip
            changed = whole.remove_columns("label").add_column("label", labels)
            datasets.DatasetDict(train=changed).save_to_disk(tmp_path / "holes")
            (tmp_path / "holes" / "codes.json").write_text((tmp_path / "codes" / "codes.json").read_text())
            with pytest.raises(ValueError, match=message):
                load_codes(tmp_path / "holes", "train", None, "labelled")


class TestClasses:
    def rows(self, labels, names=None):
        rows = datasets.Dataset.from_dict({"label": labels, "height": [4] * len(labels)})
        return rows if names is None else rows.cast_column("label", datasets.ClassLabel(names=names))

    def test_names_find_their_numbers(self):
        rows = with_classes(self.rows([0, 1, 1], ["fox", "cat"]), 3, ["cat", "dog", "fox"], "c")
        assert list(rows["label"]) == [2, 0, 0]
        same = self.rows([0, 1], ["cat", "dog"])
        assert with_classes(same, 2, ["cat", "dog"], "c") is same

    @pytest.mark.parametrize(
        ("labels", "own", "names", "message"),
        [
            ([0, 3], None, None, "label: 3 of row 1 of 'c' is not one of the 3 classes of the model"),
            ([0, 1], ["cat", "cow"], ["cat", "dog", "fox"], r"label: 1 \('cow'\) of row 1 of 'c' is not one"),
        ],
    )
    def test_foreign_classes_are_named_with_their_row(self, labels, own, names, message):
        with pytest.raises(ValueError, match=message):
            with_classes(self.rows(labels, own), 3, names, "c")


class TestSequences:
    ROW = {"label": 2, "codes": np.arange(16), "height": 4, "width": 4}  # noqa: RUF012

    def test_the_class_stands_for_boi_and_nothing_follows(self):
        vocabulary = tiny_config().vocabulary
        sequence = labelled_sequence(self.ROW, np.random.default_rng(0), vocabulary, 5)
        assert sequence.condition == 2
        assert sequence.input_ids.tolist() == [vocabulary.boi_token_id, *range(50, 66)]
        assert sequence.labels.tolist() == [-100, *range(50, 66)]

    def test_dropout_replaces_the_class(self):
        vocabulary, conditions = tiny_config().vocabulary, []
        for seed in range(400):
            sequence = labelled_sequence(self.ROW, np.random.default_rng(seed), vocabulary, 5, dropout=0.25)
            conditions.append(sequence.condition)
        assert set(conditions) == {2, 5} and 70 < conditions.count(5) < 130


class TestViews:
    def test_an_epoch_has_one_view_of_every_image(self, image_tokenizer, tmp_path):
        source = source_of(tmp_path / "data", [0, 1, 0, 1, 0])
        encode_labelled(
            image_tokenizer, source, tmp_path / "codes", Views(((16, 16),), crop="ten"), ("train",), block_rows=2
        )
        rows = load_codes(tmp_path / "codes", "train", None, "labelled")
        assert len(rows) == 50 and first_views(rows).tolist() == [0, 10, 20, 30, 40, 50]
        config = tiny_config(conditioning={"kind": "class", "classes": 2})

        def sequence(row, rng):
            return labelled_sequence(row, rng, config.vocabulary, 2)

        batches = Batches([Source("c", rows, sequence, images=first_views(rows))], config, 5, 40, seed=1)
        places = np.array([[batches.place(5 * epoch + i)[1] for i in range(5)] for epoch in range(40)])
        assert (np.sort(places // 10, axis=1) == np.arange(5)).all()  # every image once an epoch
        assert len(np.unique(places % 10)) == 10 and len(np.unique(places)) > 40  # and all of its views in time
        again = Batches([Source("c", rows, sequence, images=first_views(rows))], config, 5, 40, seed=1)
        assert [again.place(n) for n in (199, 3)] == [batches.place(n) for n in (199, 3)]
        with pytest.raises(ValueError, match=r"data.bucket: not possible with data.one_view"):
            Batches([Source("c", rows, sequence, images=first_views(rows))], config, 5, 40, bucket=True)

    def test_ten_crops_are_of_the_centre(self):
        """Of a wide image: nothing beyond the centre square of 1.25 times the size."""
        wide = np.zeros((20, 60, 3), np.uint8)
        wide[:, :20] = wide[:, 40:] = 255
        assert all(
            np.asarray(view).max() == 0 for view in Views(((16, 16),), "ten", zoom=1.25)(Image.fromarray(wide), 0)
        )

    def test_large_images_are_halved_by_means_first(self):
        pixels = np.random.default_rng(0).integers(0, 256, (40, 80, 3)).astype(np.uint8)
        halved = Image.fromarray(pixels).resize((40, 20), Image.Resampling.BOX)
        expected = halved.resize((36, 18), Image.Resampling.BICUBIC).crop((9, 0, 27, 18))
        assert np.array_equal(np.asarray(center_cover(Image.fromarray(pixels), (18, 18))), np.asarray(expected))
