"""Class-conditional models through the recipes and the command line."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import generators
from PIL import Image
from test_convert import HEADS, llamagen_state
from test_vqgan import CODES, make_layout

from convert_checkpoint import main as convert
from encode_images import main as encode
from prepare_imagenet import main as prepare
from unified import UnifiedPipeline
from unified.cli import main as unified
from unified.data.class_names import read_class_names, read_synsets
from unified.data.code_cache import load_codes
from unified.data.rows import class_names
from unified.decoding import Sampling, generate_conditioned
from unified_tokenizers import AutoImageTokenizer
from unified_tokenizers.images import to_pil

NAMES = ["tench", "goldfish", "great white shark", "tiger shark", "hammerhead"]


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A pipeline of random weights in LlamaGen's two files, converted by the recipe."""
    folder = tmp_path_factory.mktemp("converted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("test_convert.CODES", CODES)
        torch.save({"model": llamagen_state("c2i")}, folder / "c2i_B_16.pt")
    torch.save({"model": make_layout("llamagen")}, folder / "vq_ds16_c2i.pt")
    (folder / "names.txt").write_text("\n".join(NAMES))
    with pytest.MonkeyPatch.context() as patch:
        run(patch, convert, "llamagen", "--checkpoint", folder / "c2i_B_16.pt", "--image-tokenizer", folder / "vq_ds16_c2i.pt",
            "--heads", HEADS, "--class-names", folder / "names.txt", "--out", folder / "out")  # fmt: skip
    return folder


def run(monkeypatch, main, *arguments):
    monkeypatch.setattr("sys.argv", ["recipe", *map(str, arguments)])
    main()


class TestConversion:
    @pytest.mark.process
    def test_generate_samples_what_the_model_says(self, converted, tmp_path):
        """``unified generate --class``: the images of the codes after the condition."""
        assert json.loads((converted / "out" / "pipeline.json").read_text())["_class_name"] == "UnifiedPipeline"
        command = ["generate", "--pipeline", str(converted / "out"), "--class", "3", "--class", "goldfish", "--out",
                   str(tmp_path), "--guidance-scale", "2", "--seed", "5"]  # fmt: skip
        assert unified(command) == 0
        assert sorted(file.name for file in tmp_path.iterdir()) == ["000-class-3.png", "001-class-goldfish.png"]
        pipe = UnifiedPipeline.from_pretrained(converted / "out")
        codes = generate_conditioned(pipe.model, torch.tensor([3, 1]), (4, 4), Sampling(2.0), generators(5, 6))
        for file, image in zip(sorted(tmp_path.iterdir()), to_pil(pipe.image_tokenizer.decode(codes)), strict=True):
            assert np.array_equal(np.asarray(Image.open(file)), np.asarray(image))
        assert pipe.labels == {name: number for number, name in sorted(enumerate(NAMES), key=lambda pair: pair[1])}

    @pytest.mark.process
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--class", "5"], "class_labels: 5 is not one of the 5 classes (0 to 4)"),
            (["--class=-1"], "class_labels: -1 is not one of the 5 classes"),
            (["--class", "tiger sharc"], "no class is called 'tiger sharc'; did you mean 'tiger shark'"),
            (["--prompt", "a cat"], "prompt: given but the model has classes and reads no text"),
            (["--class", "1", "--negative-prompt", "a cat"], "negative_prompt: given, beside class_labels"),
            (["--class", "1", "--negative-class", "9"], "negative_class_labels: 9 is not one of"),
        ],
    )
    def test_bad_commands_are_one_line(self, converted, options, message, tmp_path, capsys):
        assert unified(["generate", "--pipeline", str(converted / "out"), "--out", str(tmp_path), *options]) == 2
        assert message in capsys.readouterr().err

    def test_prompts_and_classes_exclude_each_other(self, converted, tmp_path, capsys):
        for options in (["--class", "1", "--prompt", "a cat"], []):
            with pytest.raises(SystemExit):
                unified(["generate", "--pipeline", str(converted / "out"), "--out", str(tmp_path), *options])
        assert "not allowed with argument --class" in capsys.readouterr().err

    def test_classes_for_a_model_of_text(self, pipeline, tmp_path, capsys):
        pipeline.save_pretrained(tmp_path / "p")
        assert (
            unified(["generate", "--pipeline", str(tmp_path / "p"), "--out", str(tmp_path / "o"), "--class", "1"]) == 2
        )
        assert "class_labels: the model has no classes and reads prompts" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("names", "options", "message"),
        [
            ("a\nb", [], r"class_names: 2 names in .* the model has 5 classes"),
            (None, ["--heads", "3"], "num_attention_heads: 3 is not possible for width 32"),
            (
                None,
                ["--checkpoint", "other.pt"],
                "grid: .*other.pt' does not tell the size that the model was trained on",
            ),
        ],
    )
    def test_bad_conversions_are_named(self, converted, monkeypatch, names, options, message, tmp_path):
        given = ["--checkpoint", converted / "c2i_B_16.pt", "--heads", HEADS, *options]
        if "other.pt" in options:
            given[1] = given[-1] = shutil.copy(converted / "c2i_B_16.pt", tmp_path / "other.pt")
        if names:
            (tmp_path / "names.txt").write_text(names)
            given += ["--class-names", tmp_path / "names.txt"]
        with pytest.raises(ValueError, match=message):
            run(monkeypatch, convert, "llamagen", "--image-tokenizer", converted / "vq_ds16_c2i.pt", "--out", tmp_path / "o",
                *given)  # fmt: skip
        assert not (tmp_path / "o").exists()

    def test_an_image_tokenizer_of_another_size(self, converted, monkeypatch, parts, tmp_path):
        with pytest.raises(ValueError, match=f"has 20 codes, the model {CODES}; it was trained with another"):
            run(monkeypatch, convert, "llamagen", "--checkpoint", converted / "c2i_B_16.pt", "--heads", HEADS,
                "--image-tokenizer", parts / "image_tokenizer", "--out", tmp_path / "o")  # fmt: skip


class TestImageNet:
    SYNSETS = ("n01440764", "n02012849", "n03126707")

    @pytest.fixture
    def imagenet(self, tmp_path):
        root, rng = tmp_path / "imagenet", np.random.default_rng(0)
        for split, count in (("train", 3), ("val", 1)):
            for synset in self.SYNSETS:
                (root / split / synset).mkdir(parents=True)
                for index in range(count):
                    pixels = rng.integers(0, 256, (24, 30, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(root / split / synset / f"{synset}_{index}.JPEG", "JPEG")
        lines = ["n01440764 tench, Tinca tinca", "n02012849 crane", "n03126707 crane"]
        (root / "LOC_synset_mapping.txt").write_text("\n".join(lines) + "\n")
        return root

    @pytest.mark.process
    def test_ten_crops_with_names_and_go_on(self, imagenet, parts, monkeypatch, capsys, tmp_path):
        command = ["--source", imagenet, "--image-tokenizer", parts / "image_tokenizer", "--out", tmp_path / "codes",
                   "--image-size", 16, "--block-rows", 4]  # fmt: skip
        run(monkeypatch, prepare, *command)
        fingerprint = AutoImageTokenizer.from_pretrained(parts / "image_tokenizer").fingerprint
        train, held_out = (load_codes(tmp_path / "codes" / split, split, fingerprint, "labelled")
                           for split in ("train", "validation"))  # fmt: skip
        assert (len(train), len(held_out)) == (90, 3)
        names = ["tench, Tinca tinca, n01440764", "crane, n02012849", "crane, n03126707"]
        assert class_names(train, "label") == class_names(held_out, "label") == names
        assert [int(row["view"]) for row in train] == list(range(10)) * 9
        stamp = (tmp_path / "codes" / "train" / "codes.json").stat().st_mtime_ns
        run(monkeypatch, prepare, *command)  # what is there stays
        assert (tmp_path / "codes" / "train" / "codes.json").stat().st_mtime_ns == stamp
        assert "encoded already" in capsys.readouterr().out
        with pytest.raises(ValueError, match=r"out: .*train' was made with other settings \(views: .* set them back"):
            run(monkeypatch, prepare, *command, "--zoom", 1.25)
        (imagenet / "LOC_synset_mapping.txt").write_text("n01440764 tench\nn02012849 crane\nn03126707 crane\n")
        with pytest.raises(ValueError, match=r"train' was made with other settings \(names: "):
            run(monkeypatch, prepare, *command)

    def test_a_flat_folder_of_held_out_images_is_named_first(self, imagenet, parts, monkeypatch, tmp_path):
        for file in list((imagenet / "val").rglob("*.JPEG")):
            file.rename(imagenet / "val" / file.name)
        for synset in self.SYNSETS:
            (imagenet / "val" / synset).rmdir()
        with pytest.raises(ValueError, match=r"class_column: the validation images of .* have no 'label'"):
            run(monkeypatch, prepare, "--source", imagenet, "--image-tokenizer", parts / "image_tokenizer", "--out",
                tmp_path / "codes", "--image-size", 16)  # fmt: skip
        assert not (tmp_path / "codes").exists()


def test_encode_images_with_classes(parts, monkeypatch, capsys, tmp_path):
    """Of a folder for each class; a caption beside it is refused."""
    for name in ("cat", "dog"):
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "data" / "train" / name / "0.png")
    command = ["--source", tmp_path / "data", "--image-tokenizer", parts / "image_tokenizer", "--out", tmp_path / "codes",
               "--splits", "train", "--image-size", 16, "--class-column", "label"]  # fmt: skip
    with pytest.raises(SystemExit):
        run(monkeypatch, encode, *command, "--caption", "a cat")
    assert "--class-column: images have classes, captions or segments" in capsys.readouterr().err
    run(monkeypatch, encode, *command)
    rows = load_codes(tmp_path / "codes", "train", None, "labelled")
    assert class_names(rows, "label") == ["cat", "dog"] and [int(row["label"]) for row in rows] == [0, 1]


@pytest.mark.process
def test_inpaint_takes_a_class(converted, photo, tmp_path):
    photo.save(tmp_path / "photo.png")
    Image.new("L", (16, 16), 255).save(tmp_path / "mask.png")
    command = ["inpaint", "--pipeline", str(converted / "out"), "--class", "2", "--out", str(tmp_path / "out"), "--image",
               str(tmp_path / "photo.png"), "--mask", str(tmp_path / "mask.png")]  # fmt: skip
    assert unified(command) == 0
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["000-class-2.png"]


class TestNames:
    @pytest.mark.parametrize(
        ("file", "text"),
        [
            ("names.txt", "tench, Tinca tinca\ngoldfish\n"),
            ("names.json", '["tench, Tinca tinca", "goldfish"]'),
            ("names.json", '{"1": "goldfish", "0": "tench, Tinca tinca"}'),
        ],
    )
    def test_formats(self, tmp_path, file, text):
        (tmp_path / file).write_text(text)
        assert read_class_names(tmp_path / file) == ["tench, Tinca tinca", "goldfish"]

    def test_synsets(self, tmp_path):
        (tmp_path / "map.txt").write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish\n")
        assert read_class_names(tmp_path / "map.txt") == ["tench, Tinca tinca, n01440764", "goldfish, n01443537"]
        assert read_synsets(tmp_path / "map.txt") == {
            "n01440764": "tench, Tinca tinca, n01440764", "n01443537": "goldfish, n01443537",
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("file", "text", "message"),
        [
            ("names.txt", "cat\n\ndog", "has '' for class 1; give it a name"),
            ("names.txt", "", "holds no list of names"),
            ("names.json", '{"0": "cat", "2": "dog"}', "has no name for class 1 of 2"),
            ("names.json", "[", "is no JSON"),
            ("names.json", "[" * 100_000, "is no JSON"),
            ("names.json", "3", "holds no list of names"),
            ("missing.txt", None, "cannot be read"),
        ],
    )
    def test_bad_files_are_named(self, tmp_path, file, text, message):
        if text is not None:
            (tmp_path / file).write_text(text)
        with pytest.raises(ValueError, match=message):
            read_class_names(tmp_path / file)

    def test_a_bad_line_is_named(self, tmp_path):
        (tmp_path / "map.txt").write_text("n01440764 tench\ncat\n")
        with pytest.raises(ValueError, match=r"line 2 of .* 'cat', is no synset with its words"):
            read_synsets(tmp_path / "map.txt")
