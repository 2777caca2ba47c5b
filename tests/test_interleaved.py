"""Interleaved rows, and runs on several sources."""

import json
import runpy
import sys
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT, TEXTS, split_sequence, text_config, text_source
from PIL import Image

from unified import UnifiedPipeline
from unified.data.batches import in_order
from unified.data.captioned import captioned_sequence, text_sequence
from unified.data.code_cache import encode_source, load_codes
from unified.data.crops import fit
from unified.data.interleaved import encode_interleaved, interleaved_sequence
from unified.sequence import ImageSegment, TextSegment, build_sequence
from unified.training.config import load_config
from unified.training.data_config import SourceConfig
from unified.training.loop import train
from unified.training.sources import _texts
from unified.training.tracking import read_log
from unified.training.validation import mean_loss
from unified_tokenizers.images import to_tensor


@pytest.fixture(scope="module")
def vocabulary(text_tokenizer):
    return text_config(text_tokenizer).vocabulary


@pytest.fixture(scope="module")
def interleaved(tmp_path_factory):
    """Parquet of rows of texts and images; one has a broken image, one nothing."""
    rng = np.random.default_rng(0)
    picture = lambda h, w: Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8))  # noqa: E731
    pictures = [picture(16, 16), picture(20, 16), picture(16, 24), picture(16, 16)]
    text = lambda words: {"text": words, "image": None}  # noqa: E731
    shown = lambda image: {"text": None, "image": image}  # noqa: E731
    rows = [
        [text("a cat"), shown(pictures[0]), text("and a dog"), shown(pictures[1])],
        [shown(pictures[2]), text("  "), text("blue car")],
        [shown({"bytes": b"broken", "path": None}), text("red")],
        [text(" ")],
        [text("only words")],
        [shown(pictures[3])],
    ]
    segment = {"text": datasets.Value("string"), "image": datasets.Image()}
    features = datasets.Features({"segments": datasets.List(segment)})
    file = tmp_path_factory.mktemp("interleaved") / "rows.parquet"
    datasets.Dataset.from_dict({"segments": rows}, features=features).to_parquet(file)
    return str(file), pictures


@pytest.mark.parametrize("options", [{}, {"block_rows": 2, "batch_size": 1}, {"streaming": True}])
def test_interleaved_rows_are_encoded_once(image_tokenizer, text_tokenizer, vocabulary, interleaved, tmp_path, options):
    source, pictures = interleaved
    report = encode_interleaved(image_tokenizer, source, tmp_path / "codes", ("train",), ((16, 16),), **options)[
        "train"
    ]
    assert (report.used, report.corrupt_image, report.empty_caption) == (4, 1, 1)
    rows = load_codes(tmp_path / "codes", "train", image_tokenizer.fingerprint, "interleaved").with_format(None)
    codes = [image_tokenizer.encode(to_tensor([fit(picture, 16)]))[0] for picture in pictures]
    expected = [["a cat", codes[0], "and a dog", codes[1]], [codes[2], "blue car"], ["only words"], [codes[3]]]
    for row, segments in zip(rows, expected, strict=True):
        made = interleaved_sequence(row, None, text_tokenizer, vocabulary, 512)
        parts = [TextSegment(text_tokenizer.encode(s)) if isinstance(s, str) else ImageSegment(s) for s in segments]
        reference = build_sequence(parts, vocabulary, end=True)
        assert torch.equal(made.input_ids, reference.input_ids) and torch.equal(made.labels, reference.labels)
        assert made.image_grids == reference.image_grids


@pytest.mark.process
def test_interleaved_images_of_mixed_sizes_are_learned(
    image_tokenizer, interleaved, config_file, parts, tmp_path, monkeypatch
):
    """Each image goes to the bucket of its proportions, and rows of several grids train in one batch."""
    source, pictures = interleaved
    arguments = ["--image-tokenizer", parts / "image_tokenizer", "--source", source, "--out", tmp_path / "codes",
                 "--splits", "train", "--segments-column", "segments", "--buckets", "16x16", "24x16", "16x24"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["encode_images.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "recipes" / "encode_images.py"), run_name="__main__")
    rows = load_codes(tmp_path / "codes", "train", image_tokenizer.fingerprint, "interleaved").with_format(None)
    grids = [list(zip(row["heights"], row["widths"], strict=True)) for row in rows]
    assert grids == [[(4, 4), (6, 4)], [(4, 6)], [], [(4, 4)]]
    expected = image_tokenizer.encode(to_tensor([fit(pictures[1], (24, 16))]))[0].flatten()
    assert list(rows[0]["codes"])[16:] == expected.tolist()
    sources = f"data.sources=[{{path: {tmp_path}/codes, kind: interleaved, max_length: 99}}]"
    options = ["data.train=null", "steps=4", "validate_every=null", "checkpoint_every=null", sources,
               "schedule.patch_sizes=[2,1]", "schedule.shares=[0.5,0.5]"]  # fmt: skip
    train(load_config(config_file, [f"output_dir={tmp_path}/run", *options]))
    model = UnifiedPipeline.from_pretrained(tmp_path / "run" / "pipeline").model
    assert sorted(map(tuple, model.config.image_grids)) == [(4, 4), (4, 6), (6, 4)]
    monkeypatch.setattr(sys, "argv", ["encode_images.py", *map(str, arguments), "--flips"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "recipes" / "encode_images.py"), run_name="__main__")


def test_interleaved_rows_are_cut_at_their_length(text_tokenizer, vocabulary):
    row = {"texts": ["a cat", None, "the small dog"], "codes": range(16), "heights": [4], "widths": [4]}
    words, after = text_tokenizer.encode("a cat"), text_tokenizer.encode("the small dog")
    whole = 1 + len(words) + 18 + len(after)

    def cut(length):
        made = interleaved_sequence(row, None, text_tokenizer, vocabulary, length)
        assert len(made.input_ids) <= length
        return [
            s.ids if isinstance(s, TextSegment) else "picture"
            for s in split_sequence(made.input_ids, made.image_grids, vocabulary)
        ]

    assert cut(whole + 1) == [words, "picture", [*after, vocabulary.eos_token_id]]
    assert cut(whole) == [words, "picture", after]
    assert cut(whole - 1) == [words, "picture", after[:-1]]
    assert cut(1 + len(words) + 17) == [words]
    with pytest.raises(ValueError, match="max_length: 18 has no room for the first image"):
        interleaved_sequence({**row, "texts": [None]}, None, text_tokenizer, vocabulary, 18)


@pytest.mark.parametrize("streaming", [False, True])
def test_damaged_lines_of_interleaved_rows(image_tokenizer, streaming, tmp_path, monkeypatch):
    """A line that is no JSON; in a stream, which does not know its columns, also a row that holds something else."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")
    text = lambda words: {"text": words, "image": None}  # noqa: E731
    rows = [[text("a cat"), {"text": None, "image": "a.png"}], [text("b")], [text("blue car")]]
    lines = [json.dumps({"segments": row}) for row in rows]
    lines[1] = lines[1][:-1]
    if streaming:
        lines += [json.dumps({"segments": wrong}) for wrong in ("text", ["text"], [{"text": 5}], [{"image": 5}])]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    source, out = str(tmp_path / "rows.jsonl"), tmp_path / "codes"
    report = encode_interleaved(image_tokenizer, source, out, ("train",), ((16, 16),), streaming=streaming)["train"]
    assert (report.used, report.unreadable_row, report.corrupt_image) == (2, 4 if streaming else 1, int(streaming))
    assert f"row 1: unreadable row ({source}, line 2: no JSON" in report.examples[0]
    cache = load_codes(out, "train", None, "interleaved").with_format(None)
    assert [row["texts"] for row in cache] == [["a cat", None], ["blue car"]]


def test_texts_that_are_left_out_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "rows.jsonl").write_text(
        '{"text": "one"}\n{"text": "tw\n{"text": null}\n{"text": " "}\n{"text": "five"}'
    )
    said, source = [], SourceConfig(path=str(tmp_path / "rows.jsonl"), kind="text")
    config = SimpleNamespace(data=SimpleNamespace(storage_options={}))
    context = SimpleNamespace(accelerator=SimpleNamespace(print=said.append), config=config)
    assert list(_texts(context, source, "train")["text"]) == ["one", "five"]
    assert (
        "2 rows used, 0 corrupt images, 2 empty captions, 0 unreadable captions, 1 unreadable rows skipped" in said[0]
    )
    assert f"row 1: unreadable row ({source.path}, line 2: no JSON" in said[0]


def test_codes_that_are_no_whole_numbers_and_captions_that_are_none(text_tokenizer, vocabulary, tmp_path):
    """A cache of them is refused with the row; where they come from elsewhere, so is the row."""
    good = {"codes": [[1, 2, 3, 4]] * 2, "height": [2, 2], "width": [2, 2], "caption": ["a cat", "a dog"]}
    several = {"codes": [[1, 2, 3, 4]], "heights": [[2]], "widths": [[2]], "texts": [["a cat", None]]}
    for number, (columns, kind, message) in enumerate([
        (good, "captioned", None),
        (several, "interleaved", None),
        (good | {"codes": [[1.0, 2.0, 3.0, 4.5]] * 2}, "captioned", "column 'codes' of '.*' holds float64, not whole numbers"),
        (good | {"height": [2.0, 2.0]}, "captioned", "column 'height' of '.*' holds float64"),
        (good | {"caption": ["a cat", None]}, "captioned", "1 rows of '.*' have no caption, the first is row 1"),
        (good | {"caption": [1, 2]}, "captioned", "column 'caption' of '.*' holds int64, not text"),
        (good | {"codes": [[1, 2, 3, 4], None]}, "captioned", "1 rows of '.*' have no codes, the first is row 1"),
        (several | {"codes": [[0.5] * 4]}, "interleaved", "column 'codes' of '.*' holds float64"),
    ]):  # fmt: skip
        folder = tmp_path / str(number)
        datasets.DatasetDict(train=datasets.Dataset.from_dict(columns)).save_to_disk(folder)
        (folder / "codes.json").write_text(json.dumps({"tokenizer_fingerprint": "x", "kind": kind}))
        if message is None:
            assert len(load_codes(folder, "train", "x", kind))
        else:
            with pytest.raises(ValueError, match=f"^codes: {message}"):
                load_codes(folder, "train", "x", kind)

    rng = np.random.default_rng(0)
    row = {name: values[0] for name, values in good.items()}
    for change, message in (
        ({"caption": None}, "caption: None is no text"),
        ({"codes": [1.0, 2.0, 3.0, 4.0]}, "codes: float64"),
        ({"codes": [1, 2, 3]}, "codes: 3 codes for grids of 4"),
    ):
        with pytest.raises(ValueError, match=message):
            captioned_sequence(row | change, rng, text_tokenizer, vocabulary)
    row = {name: values[0] for name, values in several.items()}
    for change, message in (
        ({"codes": np.full(4, 0.5)}, "codes: float64"),
        ({"texts": [None, None]}, "texts: 2 places of images for 1 grids"),
    ):
        with pytest.raises(ValueError, match=message):
            interleaved_sequence(row | change, rng, text_tokenizer, vocabulary, 99)
    with pytest.raises(ValueError, match="text: None is no text"):
        text_sequence({"text": None}, rng, text_tokenizer, vocabulary)


def test_interleaved_columns_and_kinds_are_checked(image_tokenizer, interleaved, picture_source, parts, tmp_path):
    with pytest.raises(
        ValueError, match=r"segments_column: 'parts' is not a column of the source; it has \['segments'\]"
    ):
        encode_interleaved(image_tokenizer, interleaved[0], tmp_path / "x", ("train",), segments_column="parts")
    with pytest.raises(ValueError, match=r"segments_column: 'caption' must hold lists of \{text, image\}"):
        encode_interleaved(image_tokenizer, picture_source, tmp_path / "y", ("train",), segments_column="caption")
    with pytest.raises(ValueError, match="holds captioned rows, not interleaved ones"):
        load_codes(parts / "codes", "train", None, "interleaved")


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "texts.parquet"
    datasets.Dataset.from_dict({"text": [*TEXTS, " ", None]}).to_parquet(path)
    return path


@pytest.mark.process
def test_a_run_on_mixed_sources_keeps_its_text(config_file, parts, interleaved, image_tokenizer, text_file, tmp_path):
    """The same steps on images alone leave the texts unlearned. Mixed sources are resumed bit for bit."""
    train_file, picture, words = (
        config_file,
        f"{{path: {parts}/codes",
        f"{{path: {text_file}, kind: text, max_length: 99",
    )
    shared = ["steps=40", "validate_every=40", "checkpoint_every=20", "optimizer.ema_decay=null", "data.train=null",
              "schedule.patch_sizes=[2,1]", "schedule.shares=[0.5,0.5]"]  # fmt: skip
    rows = f"{{path: {interleaved[0]}, kind: interleaved, max_length: 99}}"
    alone = f"data.sources=[{picture}, validation_split: validation}}]"
    mixed = f"data.sources=[{picture}, weight: 2}},{words}, weight: 2, validation_split: train}},{rows}]"
    texts = {}
    for name, sources in (("alone", alone), ("mixed", mixed)):
        train(load_config(train_file, [f"output_dir={tmp_path}/{name}", *shared, sources]))
        pipe = UnifiedPipeline.from_pretrained(tmp_path / name / "pipeline")
        held_out = in_order(text_source(pipe.text_tokenizer, pipe.model.config), pipe.model.config, 4)
        texts[name] = mean_loss(pipe.model, held_out, torch.device("cpu"), "text_loss")
    assert texts["mixed"] < texts["alone"] - 1
    log = read_log(tmp_path / "mixed")
    assert log[-1]["text_validation_loss"] == pytest.approx(texts["mixed"], rel=1e-3)
    assert "image_validation_loss" in read_log(tmp_path / "alone")[-1]
    card = (tmp_path / "mixed" / "pipeline" / "README.md").read_text()
    assert f"Texts: `{text_file}`" in card and f"Texts with images: `{interleaved[0]}`, 4 for training" in card
    assert load_codes(tmp_path / "mixed" / "codes-2", "train", image_tokenizer.fingerprint, "interleaved").num_rows == 4
    weights = (tmp_path / "mixed" / "pipeline" / "model" / "model.safetensors").read_bytes()
    (tmp_path / "mixed" / "checkpoints" / "step-00000040").rename(tmp_path / "later")
    train(load_config(train_file, [f"output_dir={tmp_path}/mixed", *shared, mixed, "resume=latest"]))
    assert (tmp_path / "mixed" / "pipeline" / "model" / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ("[{path: a, kind: video}]", r"data.sources\[a\].kind: 'video' is unknown; use one of"),
        ("[{path: a, weight: 0}]", r"data.sources\[a\].weight: 0.0 must be above 0"),
        ("[{path: a, weight: -1}]", r"data.sources\[a\].weight: -1.0 must be above 0"),
        ("[{path: a, weight: .nan}]", r"data.sources\[a\].weight: nan must lie in \(0, inf\)"),
        ("[{path: a, kind: text, captioning: 0.5}]", r"data.sources\[a\].captioning: for images only"),
        ("[{path: a, max_length: 1}]", r"data.sources\[a\].max_length: 1 must be at least 2"),
        ("[{path: a}]", "validate_every: none of data.sources has a validation_split"),
        ("[]", "set exactly one of train and sources, got none"),
    ],
)
def test_bad_sources_are_named(config_file, sources, message):
    with pytest.raises(ValueError, match=message):
        load_config(config_file, ["output_dir=x", "data.train=null", f"data.sources={sources}"])


def test_train_and_sources_together_are_refused(config_file):
    with pytest.raises(ValueError, match="set exactly one of train and sources, got both"):
        load_config(config_file, ["output_dir=x", "data.sources=[{path: a}]"])


@pytest.mark.process
def test_empty_sources_missing_columns_and_small_weights_are_named(config_file, text_file, tmp_path):
    datasets.Dataset.from_dict({"text": [" "]}).to_parquet(tmp_path / "blank.parquet")
    for source, message in (
        (f"{{path: {text_file}, kind: text}}", "max_length 512 of .* is beyond the 128 positions of the backbone"),
        (
            f"{{path: {text_file}, kind: text, max_length: 99, text_column: body}}",
            "text_column 'body' is not a column of",
        ),
        (f"{{path: {tmp_path}/blank.parquet, kind: text, max_length: 99}}", "has no row to train on"),
        (
            f"{{path: {text_file}, kind: text, max_length: 99, weight: 1e-9}},{{path: {text_file}, kind: text, max_length: 99}}",
            "weight 1e-09 is below 1/1000",
        ),
    ):
        options = [f"output_dir={tmp_path}/run", "data.train=null", f"data.sources=[{source}]", "validate_every=null"]
        with pytest.raises(ValueError, match=message):
            train(load_config(config_file, options))


def test_codes_of_an_earlier_source_are_not_taken_for_another(config_file, picture_source, image_tokenizer, tmp_path):
    encode_source(image_tokenizer, picture_source, tmp_path / "codes", ("train",), image_size=16)
    options = [f"output_dir={tmp_path}", "data.train=./elsewhere", "validate_every=null"]
    with pytest.raises(ValueError, match=r"was made with other settings \(source: .* then, './elsewhere' now"):
        train(load_config(config_file, options))
