"""Functions of the library: sequences, arrangement, merges, batches, rows, adapters, text tokenizers, images as tensors."""

from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import torch
from conftest import tiny_config, tiny_model
from hostile.case import VALID, Case, cases, each
from hostile.world import World
from PIL import Image

from unified.conversation import DEFAULT_TEMPLATE
from unified.data import SkipReport, captioned_images
from unified.data.batches import Batches, Source, block_shares, make_batch
from unified.data.captioned import captioned_sequence
from unified.data.chat import chat_sequence
from unified.data.crops import Views
from unified.data.interleaved import _read, interleaved_sequence
from unified.data.rows import caption_text
from unified.lora.adapters import attach_lora
from unified.model.init import initialize_image_tables
from unified.prediction.arrange import arrange, pack
from unified.prediction.merge import Merge, merged_grid, windows
from unified.prediction.plan import Prediction
from unified.sequence import ImageSegment, TextSegment, TokenSequence, build_sequence
from unified_tokenizers import train_sentencepiece
from unified_tokenizers.images import to_tensor

NAN = float("nan")
CONFIG = tiny_config()
VOCABULARY = tiny_config(text={"vocab_size": 320}).vocabulary
GRID = torch.zeros(4, 4, dtype=torch.int64)
IDS = torch.tensor([1, 5, 3, *[50] * 16, 4])


def text(ids: Any) -> Callable[[World], object]:
    return lambda w: build_sequence([TextSegment(ids)], CONFIG.vocabulary)


def codes(grid: Any) -> Callable[[World], object]:
    return lambda w: build_sequence([ImageSegment(grid)], CONFIG.vocabulary)


def arranged(ids: torch.Tensor = IDS, grids: Any = ((4, 4),), **options: Any) -> Callable[[World], object]:
    return lambda w: arrange(TokenSequence(ids, ids.clone(), grids), CONFIG.vocabulary, CONFIG.coordinates, **options)


def row(values: dict[str, Any], **options: Any) -> Callable[[World], object]:
    """A row of a codes cache as a sequence."""
    whole = {"caption": "red apple", "codes": np.zeros(16, np.int32), "height": 4, "width": 4, **values}
    return lambda w: captioned_sequence(whole, np.random.default_rng(0), w.text_tokenizer, VOCABULARY, **options)


def interleaved(values: dict[str, Any], max_length: int = 64) -> Callable[[World], object]:
    whole = {"texts": ["red", None], "codes": [0] * 16, "heights": np.array([4]), "widths": np.array([4]), **values}
    return lambda w: interleaved_sequence(whole, None, w.text_tokenizer, VOCABULARY, max_length)


def chat(values: dict[str, Any], max_length: int = 64, template: str = DEFAULT_TEMPLATE) -> Callable[[World], object]:
    whole = {
        "texts": [None, "red", "yes"], "roles": ["user", None, "assistant"], "codes": [0] * 16, "heights": np.array([4]),
        "widths": np.array([4]), **values,
    }  # fmt: skip
    return lambda w: chat_sequence(whole, None, w.text_tokenizer, VOCABULARY, template, max_length)


def source(weight: Any, rows: int = 3) -> Source:
    return Source("texts", datasets.Dataset.from_dict({"text": ["a"] * rows}), lambda row, rng: None, weight)


def lora(options: dict[str, Any]) -> Callable[[World], object]:
    return lambda w: attach_lora(tiny_model(), **options)


def train_text(captions: Any, vocab_size: Any = 320) -> Callable[[World], object]:
    return lambda w: train_sentencepiece(captions, w.fresh(), vocab_size)


def tables(options: dict[str, Any]) -> Callable[[World], object]:
    model = tiny_model()
    weights = model.image_embed.weight, model.image_head.weight
    text = model.get_input_embeddings(), model.get_output_embeddings().weight
    return lambda w: initialize_image_tables(*weights, *text, 50, **options)


CASES: list[Case] = [
    *each(
        "build_sequence: text",
        text,
        [
            ([-1], "ids -1"),
            ([50], "ids 50"),
            ([1.5], "ids float"),
            (["a"], "ids"),
            ([None], "ids"),
            ([[1, 2]], "ids"),
            (7, "ids"),
            ([NAN], "ids"),
            ([2**70], "ids"),
            (torch.tensor([1.0]), "ids"),
            ([True], "ids bool"),
            ("abc", "ids"),
            ([], VALID),
            ([5, 6], VALID),
            (np.array([5, 6], np.int32), VALID),
            (None, "ids"),
        ],
    ),
    *each(
        "build_sequence: codes",
        codes,
        [
            (GRID - 1, "codes -1"),
            (GRID + 20, "codes 20"),
            (GRID.float(), "codes float32"),
            (GRID[0], "codes (4,)"),
            (GRID[:0], "codes (0, 4)"),
            (GRID > 0, "codes bool"),
            (GRID[None], "codes (1, 4, 4)"),
            (GRID.to(torch.complex64), "codes complex64"),
            ([[0] * 4] * 4, "codes list"),
            (None, "codes None"),
            (GRID.numpy(), "codes ndarray"),
            (GRID.to(torch.uint8), VALID),
        ],
    ),
    *cases(
        "build_sequence: text",
        ("no segments", lambda w: build_sequence([], CONFIG.vocabulary), VALID),
        ("a text that is no segment", lambda w: build_sequence(["red apple"], CONFIG.vocabulary), "segments red"),
        (
            "an end without token",
            lambda w: build_sequence([], tiny_config(text={"eos_token_id": None}).vocabulary, end=True),
            "eos",
        ),
    ),
    *cases(
        "arrange",
        ("a missing grid", arranged(grids=()), "image_grids 0"),
        ("two grids", arranged(grids=[(4, 4)] * 2), "image_grids 2"),
        ("a small grid", arranged(grids=[(2, 4)]), "image_grids 2x4"),
        ("a grid of one number", arranged(grids=[(4,)]), "image_grids"),
        ("a grid of text", arranged(grids=["44"]), "image_grids"),
        ("a grid of floats", arranged(grids=[(4.0, 4.0)]), "image_grids"),
        ("a negative grid", arranged(grids=[(-4, -4)]), "image_grids"),
        ("no <boi>", arranged(IDS[2:].flip(0)[:17]), "input_ids boi"),
        ("an id beyond", arranged(IDS + 60, ()), "input_ids"),
        ("a negative id", arranged(torch.where(IDS == 5, -7, IDS)), "input_ids -7"),
        ("floats", arranged(IDS.float()), "input_ids float32"),
        ("two dimensions", arranged(IDS[None]), "input_ids (1, 20)"),
        ("regions that do not fit", arranged(prediction=Prediction("regions", 3)), "prediction.size 3 4x4"),
        ("more passes than cells", arranged(prediction=Prediction("locality", 17)), "prediction.size 17 1..16"),
        ("windows that do not fit a grid", arranged(prediction=Prediction(merge=Merge("channel", 3))), "patch_size 3"),
        ("windows that do not fit", arranged(merge=Merge("mean", 3)), "patch_size 3"),
        (
            "labels of another length",
            lambda w: arrange(TokenSequence(IDS, IDS[:3], [(4, 4)]), CONFIG.vocabulary, CONFIG.coordinates),
            "labels",
        ),
        ("an empty sequence", arranged(IDS[:0], ()), VALID),
        ("rows that are too long", lambda w: pack([arranged()(w)], 3), "max_length 3"),
        (
            "a packed length of 3",
            lambda w: make_batch([TokenSequence(IDS, IDS, [(4, 4)])], CONFIG, pack_length=3),
            "pack 3",
        ),
        ("no sequences", lambda w: make_batch([], CONFIG), "sequences"),
    ),
    *cases(
        "merge",
        ("an unknown way", lambda w: Merge("max", 2), "merge max"),
        ("a side of 0", lambda w: Merge("mean", 0), "merge 0"),
        ("a side of 1.5", lambda w: Merge("mean", 1.5), "merge 1.5"),
        ("a side of nan", lambda w: Merge("mean", NAN), "merge nan"),
        ("a side of text", lambda w: Merge("mean", "2"), "merge 2"),
        ("one of side 2", lambda w: Merge("one", 2), "merge 2"),
        ("a way that is a list", lambda w: Merge([], 2), "merge []"),
        ("a patch that does not divide", lambda w: merged_grid((4, 4), 3), "patch_size 3 4x4"),
        ("a patch of 0", lambda w: merged_grid((4, 4), 0), "patch_size 0"),
        ("a patch of -2", lambda w: merged_grid((4, 4), -2), "patch_size -2"),
        ("too few codes", lambda w: windows(torch.zeros(1, 15), (4, 4), 2), "grid 4x4 15"),
    ),
    *each(
        "rows: codes",
        row,
        [
            ({"codes": np.full(16, 20)}, "codes 20"),
            ({"codes": np.full(16, -1)}, "codes -1"),
            ({"codes": np.zeros(15, int)}, "codes 15"),
            ({"codes": np.full(16, 1.5)}, "codes float64"),
            ({"codes": np.full(16, NAN)}, "codes"),
            ({"codes": None}, "codes"),
            ({"codes": ["a"] * 16}, "codes"),
            ({"height": -4, "width": -4}, "height -4"),
            ({"height": 0}, "codes"),
            ({"height": None}, "height None"),
            ({"caption": None}, "caption None"),
            ({"codes": np.zeros(0, int)}, "codes 0"),
            ({"height": 2, "width": 8}, VALID),
        ],
    ),
    *each(
        "rows: interleaved",
        interleaved,
        [
            ({"codes": [0] * 15}, "codes 15"),
            ({"codes": [0] * 17}, "codes 17"),
            ({"codes": [20] * 16}, "codes 20"),
            ({"codes": [-1] * 16}, "codes -1"),
            ({"codes": [0.5] * 16}, "codes"),
            ({"heights": np.array([4, 4])}, "heights"),
            ({"heights": np.array([0])}, "codes"),
            ({"heights": np.array([-4]), "widths": np.array([-4])}, "height -4"),
            ({"texts": ["red", None, None]}, "texts images"),
            ({"texts": []}, "texts"),
            ({"texts": None}, "texts None"),
            ({"texts": ["red"]}, "texts"),
            ({}, VALID),
        ],
    ),
    *each(
        "rows: chat",
        chat,
        [
            ({"codes": [0] * 15}, "codes 15"),
            ({"codes": [20] * 16}, "codes 20"),
            ({"codes": [-1] * 16}, "codes -1"),
            ({"heights": np.array([0])}, "codes"),
            ({"heights": np.array([4, 4])}, "codes heights"),
            ({"texts": [None, None, "yes"]}, "texts images"),
            ({"texts": ["red"]}, "roles"),
            ({"roles": [None, "user", "assistant"]}, "roles"),
            ({"roles": ["user", None, "user"]}, "roles"),
            ({"roles": ["user", None, "assistant"]}, VALID),
        ],
    ),
    *each(
        "rows: chat",
        lambda template: chat({}, template=template),
        [
            ("{{ messages[0].role }}", "chat_template once"),
            ("{% for m in messages %}{{ m.role }}", "chat_template"),
            ("{{ 1 / 0 }}", "chat_template"),
            ("{{ nothing.at.all }}", "chat_template"),
            ("{{ raise_exception('no') }}", "chat_template no"),
            ("{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}", VALID),
        ],
    ),
    *cases("rows: chat", ("no room", chat({}, 12), "max_length 12")),
    *cases(
        "rows: interleaved",
        ("no room for an image", interleaved({"texts": [None]}, 5), "max_length 5"),
        (
            "segments of text and image",
            lambda w: _read([{"text": "a", "image": w.photo}], [(16, 16)]),
            "segment text image",
        ),
        ("an image of a number", lambda w: _read([{"text": None, "image": 7}], [(16, 16)]), "7"),
    ),
    *each(
        "rows: captions",
        lambda value: lambda w: caption_text(value),
        [
            ({"a": 1}, "text"),
            (object(), "text"),
            (b"\xff\xfe\x00", "UTF-8"),
            ("\ufffd", "UTF-8"),
            ([{}], "text"),
            ({1, 2}, "text"),
            (None, VALID),
            (NAN, VALID),
            (7, VALID),
            (np.array(["a", "b"]), VALID),
            ("", VALID),
            ([None, "a"], VALID),
        ],
    ),
    *cases(
        "rows: captions",
        ("a class outside", lambda w: caption_text(5, ["a", "b"]), "5 classes"),
        (
            "no image column",
            lambda w: list(captioned_images(datasets.Dataset.from_dict({"caption": ["a"]}), SkipReport())),
            "image_column image",
        ),
        (
            "no caption column",
            lambda w: list(captioned_images(datasets.Dataset.from_dict({"image": ["a"]}), SkipReport())),
            "caption_column caption",
        ),
        (
            "images that are numbers",
            lambda w: list(
                captioned_images(datasets.Dataset.from_dict({"image": [1], "caption": ["a"]}), SkipReport())
            ),
            "image_column int64",
        ),
    ),
    *each(
        "batches",
        lambda weights: lambda w: block_shares(weights),
        [
            ([0.0], "weight 0"),
            ([-1.0], "weight -1"),
            ([NAN], "weight nan"),
            ([float("inf")], "weight inf"),
            ([1.0, 1e-9], "weight 1e-09"),
            ([], "sources"),
            (["a"], "weight a"),
            ([None], "weight None"),
            ([1.0, 3.0], VALID),
        ],
    ),
    *cases(
        "batches",
        ("no rows", lambda w: Batches([source(1.0, 0)], CONFIG, 2, 3), "texts row"),
        ("buckets of two sources", lambda w: Batches([source(1.0)] * 2, CONFIG, 2, 3, bucket=True), "bucket"),
        ("no source", lambda w: Batches([], CONFIG, 2, 3), "sources"),
    ),
    *each(
        "crops",
        lambda given: lambda w: list(Views(**{"sizes": ((16, 16),), **given})(w.photo, 0)),
        [
            ({"sizes": ()}, "sizes ()"),
            ({"sizes": ((0, 16),)}, "sizes 0"),
            ({"sizes": ((-16, 16),)}, "sizes -16"),
            ({"sizes": ((16.5, 16),)}, "sizes 16.5"),
            ({"sizes": (("a", 16),)}, "sizes"),
            ({"sizes": ((16,),)}, "sizes"),
            ({"sizes": 16}, "sizes 16"),
            ({"crop": "corner"}, "crop corner"),
            ({"count": 0}, "count 0"),
            ({"count": 2}, "count 2"),
            ({"crop": "random", "count": 1.5}, "count 1.5"),
            ({"zoom": 0.5}, "zoom 0.5"),
            ({"zoom": NAN}, "zoom nan"),
            ({"zoom": float("inf")}, "zoom inf"),
            ({"zoom": "2"}, "zoom 2"),
            ({"crop": "random", "seed": -1}, "seed -1"),
            ({"crop": None}, "crop None"),
        ],
    ),
    *each(
        "attach_lora",
        lora,
        [
            ({"rank": 0}, "r 0"),
            ({"rank": -1}, "r -1"),
            ({"rank": 1.5}, "r 1.5"),
            ({"rank": "4"}, "r 4"),
            ({"rank": 10**9}, "r 1000000000"),
            ({"rank": NAN}, "r nan"),
            ({"rank": True}, "r True"),
            ({"alpha": 0}, "lora_alpha 0"),
            ({"alpha": -3}, "lora_alpha -3"),
            ({"alpha": NAN}, "lora_alpha nan"),
            ({"alpha": "a"}, "lora_alpha a"),
            ({"dropout": 1}, "lora_dropout 1"),
            ({"dropout": -0.1}, "lora_dropout -0.1"),
            ({"dropout": NAN}, "lora_dropout nan"),
            ({"target_modules": []}, "target_modules []"),
            ({"target_modules": ["nothing"]}, "target_modules nothing"),
            ({"target_modules": "q_proj"}, "target_modules q_proj"),
            ({"target_modules": "(a+)+$"}, "target_modules"),
            ({"target_modules": ["(a|a)*"]}, "target_modules"),
            ({"target_modules": [7]}, "target_modules 7"),
            ({"target_modules": 7}, "target_modules 7"),
            ({"target_modules": ["norm"]}, "LlamaRMSNorm supported"),
            ({"modality": "sound"}, "modality sound"),
            ({"modality": None}, "modality None"),
            ({"modality": "image", "use_dora": True}, "modality use_dora"),
            ({"modality": "image", "target_modules": ["image_head"]}, "modality image_head"),
            ({"train_image_tables": "yes"}, "train_image_tables yes"),
            ({"init_lora_weights": "pissa"}, "init_lora_weights pissa"),
            ({"rank_pattern": {"(a+)+": 3}}, "rank_pattern"),
            ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
            ({"alpha_pattern": {"q_proj": NAN}}, "alpha_pattern"),
            ({"layers_to_transform": [7]}, "layers_to_transform 7"),
            ({"layers_to_transform": "all"}, "layers_to_transform"),
            ({"exclude_modules": "(a+)+"}, "exclude_modules"),
            ({"bias": "all"}, "bias"),
            ({"loftq_config": {"a": 1}}, "loftq_config"),
            ({"use_rslora": "yes"}, "use_rslora yes"),
            ({"rank": 2}, VALID),
        ],
    ),
    *each(
        "train_sentencepiece",
        train_text,
        [
            ([], "captions"),
            (["", "  "], "captions"),
            ([None], "captions None"),
            ([7], "captions 7"),
            ([b"red"], "captions"),
            ("red", "captions"),
            (None, "captions None"),
            (7, "captions 7"),
            (["\ud800"], "captions Unicode"),
            (["\x00\x01" * 50], VALID),
            (["a" * 9_000], VALID),
        ],
    ),
    *each(
        "train_sentencepiece",
        lambda size: train_text(["red apple", "blue car"], size),
        [
            (0, "vocab_size 0"),
            (-1, "vocab_size -1"),
            (100, "vocab_size 100"),
            (300.5, "vocab_size 300.5"),
            ("320", "vocab_size 320"),
            (None, "vocab_size None"),
            (10**12, "vocab_size 1000000000000"),
            (NAN, "vocab_size nan"),
        ],
    ),
    *each(
        "initialize_image_tables",
        tables,
        [
            ({"image_init": "zero"}, "image_init zero"),
            ({"head_init": "codebook"}, "head_init codebook"),
            ({"image_init": "codebook"}, "image_init codebook"),
            ({"image_init": "codebook", "codebook": torch.zeros(3, 4)}, "codebook (3, 4)"),
            ({"image_init": "codebook", "codebook": torch.zeros(20)}, "codebook (20,)"),
            ({"image_init": "codebook", "codebook": torch.zeros(20, 4)}, "codebook"),
            ({"image_init": None}, "image_init None"),
        ],
    ),
    *cases(
        "image tokenizer",
        ("integers", lambda w: w.image_tokenizer.encode(torch.zeros(1, 3, 16, 16).long()), "images int64"),
        ("grey", lambda w: w.image_tokenizer.encode(torch.zeros(1, 1, 16, 16)), "images (1, 1, 16, 16)"),
        ("three dimensions", lambda w: w.image_tokenizer.encode(torch.zeros(3, 16, 16)), "images (3, 16, 16)"),
        ("another stride", lambda w: w.image_tokenizer.encode(torch.zeros(1, 3, 17, 16)), "images 17x16"),
        ("nothing", lambda w: w.image_tokenizer.encode(torch.zeros(1, 3, 0, 0)), "images 0x0"),
        ("nan", lambda w: w.image_tokenizer.encode(torch.full((1, 3, 16, 16), NAN)), "images finite"),
        ("an array", lambda w: w.image_tokenizer.encode(np.zeros((1, 3, 16, 16), np.float32)), "images ndarray"),
        ("a path", lambda w: w.image_tokenizer.encode("image.png"), "images str"),
        ("a code beyond", lambda w: w.image_tokenizer.decode(torch.full((1, 4, 4), 20)), "codes 20"),
        ("a negative code", lambda w: w.image_tokenizer.decode(torch.full((1, 4, 4), -1)), "codes -1"),
        ("codes of floats", lambda w: w.image_tokenizer.decode(torch.zeros(1, 4, 4)), "codes float32"),
        ("codes of int32", lambda w: w.image_tokenizer.decode(torch.zeros(1, 4, 4, dtype=torch.int32)), "codes int32"),
        ("codes in a row", lambda w: w.image_tokenizer.decode(torch.zeros(1, 16).long()), "codes (1, 16)"),
        ("codes of lists", lambda w: w.image_tokenizer.decode([[[0]]]), "codes list"),
        ("images of two sizes", lambda w: to_tensor([w.photo, Image.new("RGB", (8, 8))]), "images (8, 8)"),
        ("no images", lambda w: to_tensor([]), "images"),
        ("images that are arrays", lambda w: to_tensor([np.zeros((16, 16, 3))]), "images ndarray"),
    ),
]
