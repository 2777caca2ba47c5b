"""CLIP scores on hand-made vectors, and the small CLIP: training, folder, name, errors."""

import json
import math
from itertools import islice

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from unified_eval import (
    clip_features,
    clip_score,
    load_clip,
    retrieval_at_1,
    save_nano_clip,
    shuffled_gap,
    train_nano_clip,
)
from unified_eval.clip import clip_recipe, shuffled_score, tokenize
from unified_eval.nano_clip import augment, grouped_retrieval, unique_caption_batches

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "yellow": (240, 220, 10)}
# Three images, three captions; cosines by rows: (0.6, 1, 0), (0, 0, 0.8), (0.8, 0, -0.6) once normalised.
IMAGES = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 0.5]])
TEXTS = torch.tensor([[0.6, 0.0, 0.8], [5.0, 0.0, 0.0], [0.0, 0.8, -0.6]])


def flat_images() -> list[Image.Image]:
    return [Image.new("RGB", (80, 64), colour) for colour in COLOURS.values()]


@pytest.fixture(scope="module")
def nano():
    captions = [f"a {name} square" for name in COLOURS]
    return train_nano_clip(flat_images(), captions, "squares-nano", steps=2, batch_size=4, progress=False)


def test_clip_score_of_known_vectors():
    assert clip_score(IMAGES, TEXTS) == pytest.approx(100 * (0.6 + 0.0 - 0.6) / 3, abs=1e-6)
    assert clip_score(IMAGES, -IMAGES) == pytest.approx(-100)  # not clamped
    assert clip_score(IMAGES[:2], TEXTS[:2]) == pytest.approx(30)


def test_shuffled_score_and_gap_of_known_vectors():
    mismatched = [1.0, 0.0, 0.0, 0.8, 0.8, 0.0]
    assert shuffled_score(IMAGES, TEXTS) == pytest.approx(100 * sum(mismatched) / 6)
    assert shuffled_gap(IMAGES, TEXTS) == pytest.approx(-100 * sum(mismatched) / 6, abs=1e-5)


def test_retrieval_of_known_vectors():
    assert retrieval_at_1(IMAGES, IMAGES) == 1.0
    assert retrieval_at_1(IMAGES, IMAGES[[1, 0, 2]], ["b", "a", "c"]) == pytest.approx(1 / 3)
    assert retrieval_at_1(IMAGES, TEXTS) == 0.0
    tied = torch.tensor([[1.0, 1.0], [1.0, -1.0]])  # the first image is as near to either caption
    assert retrieval_at_1(torch.tensor([[1.0, 0.0], [0.0, -1.0]]), tied) == 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: retrieval_at_1(IMAGES, TEXTS, ["cat", "dog", " Cat "]), r"number 2 repeats number 0 \(' Cat '\)"),
        (lambda: retrieval_at_1(IMAGES, TEXTS[[0, 1, 1]]), "captions: number 2 repeats number 1"),
        (lambda: retrieval_at_1(IMAGES, TEXTS, ["cat"]), "captions: 1 captions for 3 rows"),
        (lambda: clip_score(IMAGES, TEXTS[:2]), r"need two equal shapes \(N, E\)"),
        (lambda: clip_score(IMAGES[:0], TEXTS[:0]), r"need two equal shapes \(N, E\)"),
        (lambda: clip_score(IMAGES * math.nan, TEXTS), "image_features: a row is zero or not finite"),
        (lambda: clip_score(IMAGES, TEXTS * 0), "text_features: a row is zero or not finite"),
        (lambda: shuffled_score(IMAGES[:1], TEXTS[:1]), "image_features: 1 row has no other caption"),
    ],
)
def test_bad_features_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_captions_that_would_be_cut_are_named():
    tokenizer = open_clip.SimpleTokenizer(context_length=6)
    fits = "one two three four"  # with its start and end marks exactly six tokens
    assert tokenize(tokenizer, [fits]).shape == (1, 6)
    with pytest.raises(ValueError, match="'one two three four five' is longer than the context of 6 tokens"):
        tokenize(tokenizer, ["cat", fits + " five"])
    with pytest.raises(ValueError, match="captions: one is empty"):
        tokenize(tokenizer, ["cat", " "])
    with pytest.raises(ValueError, match="captions: the list is empty"):
        tokenize(tokenizer, [])


@pytest.mark.process
def test_training_learns():
    captions = [f"a {name} square" for name in COLOURS]
    nano = train_nano_clip(flat_images(), captions, "squares-nano", steps=40, batch_size=4, progress=False)
    assert grouped_retrieval(nano, flat_images(), captions) == {"r1": 1.0, "captions": 4, "groups": 1}
    shuffled = captions[1:] + captions[:1]
    assert grouped_retrieval(nano, flat_images(), shuffled)["r1"] == 0.0


@pytest.mark.process
def test_a_seed_fixes_the_model():
    def digest(seed: int) -> str:
        clip = train_nano_clip(flat_images(), list(COLOURS), "x", steps=2, batch_size=4, seed=seed, progress=False)
        return clip_recipe(clip)["clip_state_sha256"]

    first = digest(0)
    assert digest(0) == first and digest(1) != first


@pytest.mark.process
def test_folder_round_trip_gives_identical_features(nano, tmp_path):
    folder = save_nano_clip(nano, tmp_path / "clip", {"steps": 2})
    assert {path.name for path in folder.iterdir()} == {
        "nano_clip.json", "open_clip_config.json", "open_clip_model.safetensors",
    }  # fmt: skip
    loaded = load_clip(folder)
    captions = [f"a {name} square" for name in COLOURS]
    pairs = zip(
        clip_features(nano, flat_images(), captions), clip_features(loaded, flat_images(), captions), strict=True
    )
    for before, after in pairs:
        assert before.shape == (4, 128) and torch.equal(before, after)
        torch.testing.assert_close(before.norm(dim=1), torch.ones(4, dtype=torch.float64))
    assert loaded.name == "squares-nano" and clip_recipe(loaded)["clip"] == "squares-nano"
    assert json.loads((folder / "nano_clip.json").read_text()) == {"name": "squares-nano", "steps": 2}
    save_nano_clip(loaded, folder, {})  # an earlier model is replaced, anything else is not
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(ValueError, match="exists and is no earlier nano CLIP"):
        save_nano_clip(loaded, tmp_path / "mine", {})
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_folders_without_weights_or_preprocessing_are_refused(nano, tmp_path):
    for absent in (tmp_path / "absent", "~/absent-clip", "runs/nope"):
        with pytest.raises(ValueError, match=r"clip: '.*' does not exist on this machine"):
            load_clip(absent)
    with pytest.raises(ValueError, match="is neither a folder nor 'architecture/tag'"):
        load_clip("somebody/something")
    with pytest.raises(ValueError, match=r"tags of this architecture: \[.*'laion2b_s34b_b79k'"):
        load_clip("ViT-B-32")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no open_clip_config.json"):
        load_clip(tmp_path / "empty")
    folder = save_nano_clip(nano, tmp_path / "clip", {})
    config = json.loads((folder / "open_clip_config.json").read_text())
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no weights"):
        load_clip(f"local-dir:{folder}")
    del config["preprocess_cfg"]["mean"]
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"preprocess_cfg .* lacks \['mean'\]"):
        load_clip(folder)


def test_a_folder_in_the_home_folder(nano, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_nano_clip(nano, tmp_path / "clip", {})
    assert load_clip("~/clip").name == load_clip("local-dir:~/clip").name == "squares-nano"


@pytest.mark.process
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("text_projection"), "cannot be loaded .*Missing key.*text_projection"),
        (lambda t: t.update(extra=torch.zeros(2)), "cannot be loaded .*Unexpected key.*extra"),
        (
            lambda t: t.update({"text_projection": torch.zeros(2, 2)}),
            "cannot be loaded .*size mismatch for text_projection",
        ),
    ],
)
def test_a_clip_is_whole(nano, tmp_path, change, message):
    folder = save_nano_clip(nano, tmp_path / "clip", {})
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')  # means nothing here
    assert clip_recipe(load_clip(folder)) == clip_recipe(nano)
    tensors = load_file(folder / "open_clip_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match=f"clip: '.*' {message}"):
        load_clip(folder)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("vision_cfg", "layers", 10**6),
        ("text_cfg", "layers", 10**12),
        ("text_cfg", "width", 64 * 10**5),
        ("text_cfg", "vocab_size", 10**12),
        ("vision_cfg", "image_size", 2**20),
    ],
)
def test_sizes_that_the_files_do_not_hold(nano, tmp_path, part, name, value):
    folder = save_nano_clip(nano, tmp_path / "clip", {})
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"][part][name] = value
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"^config: "):
        load_clip(folder)


@pytest.mark.parametrize("known", [True, False])
def test_code_of_a_folder_is_never_run(nano, known, word_tokenizer, tmp_path, monkeypatch):
    """Not even where its configuration says so; a tokenizer that transformers knows is loaded without it."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers asks
    folder = save_nano_clip(nano, tmp_path / "clip", {})
    word_tokenizer.save_pretrained(folder)
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] |= {"hf_tokenizer_name": "x", "tokenizer_kwargs": {"trust_remote_code": True}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"]}}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config | ({} if known else {"tokenizer_class": "Unheard"}))
    )
    try:
        load_clip(folder)
    except ValueError as error:
        assert not known and "cannot be loaded" in str(error)
    assert not (tmp_path / "ran").exists()


def test_training_refuses_what_it_cannot_batch():
    images = flat_images()
    with pytest.raises(ValueError, match="batch_size: 4 is above the 3 different captions"):
        train_nano_clip(images, ["red", "Green", "green", "blue"], "x", steps=1, batch_size=4, progress=False)
    with pytest.raises(ValueError, match="captions: 1 captions for 4 images"):
        train_nano_clip(images, ["red"], "x", progress=False)
    with pytest.raises(ValueError, match="steps, batch_size: need 1 or more and 2 or more, got 0 and 4"):
        train_nano_clip(images, list(COLOURS), "x", steps=0, batch_size=4, progress=False)


def test_no_caption_comes_twice_in_a_batch():
    groups = [[0, 5, 6], [1], [2, 7], [3], [4]]
    group_of = {row: number for number, rows in enumerate(groups) for row in rows}
    batches = list(islice(unique_caption_batches(groups, 2, seed=0), 100))
    assert all(len({group_of[row] for row in batch}) == 2 for batch in batches)
    assert {row for batch in batches for row in batch} == set(range(8))


def test_augmentation_moves_images_but_keeps_colours():
    noise = torch.Generator().manual_seed(0)
    flat = torch.tensor([0.8, -0.9, 0.1]).view(1, 3, 1, 1).expand(16, 3, 64, 64)
    np.testing.assert_allclose(augment(flat, noise).mean((2, 3)), flat.mean((2, 3)), atol=0.01)
    dot = torch.ones(16, 3, 64, 64)
    dot[:, :, 30:34, 30:34] = -1
    darkest = augment(dot, noise).mean(1).flatten(1).argmin(1)
    rows, columns = darkest // 64, darkest % 64
    assert len(set(rows.tolist())) > 3 and len(set(columns.tolist())) > 3
    assert ((rows - 31).abs() <= 7).all() and ((columns - 31).abs() <= 7).all()
