"""Templates of prompts, what stands for no caption, and tokens inside images."""

import numpy as np
import pytest
from conftest import tiny_config, tiny_model, tiny_pipeline

from unified import UnifiedPipeline
from unified.data.captioned import captioned_sequence
from unified.pipeline.arguments import Wanted
from unified.prediction.frame import Frame, image_length
from unified.prompts import PromptFormat

ROW = {"caption": " red apple ", "codes": list(range(16)), "height": 4, "width": 4}


def test_a_template_names_special_tokens_and_a_caption_does_not(text_tokenizer):
    encode, special = text_tokenizer.encode, text_tokenizer.special_tokens
    assert PromptFormat("a {prompt} tree").caption_ids(" red apple ", text_tokenizer, (4, 4)) == encode(
        "a red apple tree"
    )
    ids = PromptFormat("<s>{prompt}</s>a").caption_ids("red </s>", text_tokenizer, (4, 4))
    assert ids == [special["<s>"], *encode("red </s>"), special["</s>"], *encode("a")]
    assert special["</s>"] not in encode("red </s>")


def test_what_stands_for_no_caption(text_tokenizer):
    pad, encode = text_tokenizer.special_tokens["<pad>"], text_tokenizer.encode
    assert PromptFormat("a {prompt}").null_ids(text_tokenizer, (4, 4), 3) == []
    assert PromptFormat(null="blue car").null_ids(text_tokenizer, (4, 4), 3) == encode("blue car")
    assert PromptFormat(null="<pad>", null_repeats=True).null_ids(text_tokenizer, (4, 4), 3) == [pad] * 3
    with pytest.raises(ValueError, match=r"null_prompt: '<pad><pad>' has 2 tokens; one that repeats must be a single"):
        PromptFormat(null="<pad><pad>", null_repeats=True).null_ids(text_tokenizer, (4, 4), 3)


def test_a_template_names_the_size_of_the_image(text_tokenizer):
    prompts = PromptFormat("{width} by {height}: {prompt}", "{height}", code_pixels=8)
    wanted = text_tokenizer.encode("24 by 16: {width}")  # a caption names none
    assert prompts.caption_ids("{width}", text_tokenizer, (2, 3)) == wanted
    assert prompts.null_ids(text_tokenizer, (2, 3)) == text_tokenizer.encode("16")


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_training_and_sampling_write_the_same_prompt(dropout, text_tokenizer):
    """A row of training is what a pipeline samples after, with a caption and without."""
    config = tiny_config(
        text={"vocab_size": text_tokenizer.vocab_size}, prompt_template="a {prompt} tree {height}", null_prompt="<pad>",
        null_prompt_repeats=True, code_pixels=8, boi_token_id=text_tokenizer.boi_token_id, eoi_token_id=text_tokenizer.eoi_token_id,
    )  # fmt: skip
    sequence = captioned_sequence(
        ROW, np.random.default_rng(0), text_tokenizer, config.vocabulary, dropout, prompts=PromptFormat.of(config)
    )
    sides = Wanted("red apple").rows(config, text_tokenizer, (4, 4))
    (row,) = sides[int(dropout)]
    assert sequence.input_ids[: len(row.ids)].tolist() == list(row.ids)
    assert len(sides[0][0].ids) == len(sides[1][0].ids) and sides[0] != sides[1]
    assert list(sides[0][0].ids[1:-1]) == text_tokenizer.encode("a red apple tree 32")


def test_a_pipeline_keeps_its_template_and_negative_prompt(text_tokenizer, image_tokenizer, tmp_path):
    pipe = tiny_pipeline(text_tokenizer, image_tokenizer, prompt_template="a {prompt} tree", null_prompt="yellow sun")
    pipe.sampling = {"negative_prompt": "blue car"}
    pipe.save_pretrained(tmp_path)
    loaded = UnifiedPipeline.from_pretrained(tmp_path)

    def rows(**given):
        """Ids between <bos> and <boi>, of the prompt and of its negative side."""
        sides = Wanted("red apple", **given).filled(loaded.sampling).rows(loaded.model.config, text_tokenizer, (4, 4))
        return [list(side[0].ids[1:-1]) for side in sides]

    red, blue, dog = (text_tokenizer.encode(f"a {text} tree") for text in ("red apple", "blue car", "the small dog"))
    assert rows() == [red, blue] and rows(negative_prompt="the small dog") == [red, dog]
    assert rows(negative_prompt="") == [red, text_tokenizer.encode("yellow sun")]
    with pytest.raises(ValueError, match=r"sampling\.negative_prompt: 3 is not a text"):
        pipe.sampling = {"negative_prompt": 3}


def test_tokens_of_a_frame():
    frame = Frame.from_mapping({"before": {"2x3": [7, 8]}, "row_end": 9, "after": [5]})
    assert frame.tokens((2, 3)).tolist() == [7, 8, -1, -1, -1, 9, -1, -1, -1, 9, 5]
    assert image_length(tiny_config(positions="1d", image_frame={"row_end": 9}), (2, 3)) == 8
    assert Frame.from_mapping({"between_rows": 9}).tokens((2, 3)).tolist() == [-1, -1, -1, 9, -1, -1, -1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_template": "a tree"}, r"prompt_template: .*a text with \{prompt\} in it, once"),
        ({"prompt_template": "{prompt} {prompt}"}, "prompt_template: "),
        ({"null_prompt": 3}, "null_prompt: "),
        ({"null_prompt_repeats": "yes"}, "null_prompt_repeats: "),
        ({"image_projection": 0}, "image_projection: "),
        ({"image_frame": []}, "image_frame: "),
        ({"image_frame": {"row_end": 9}, "positions": "2d"}, "image_frame: counts its tokens as text does, positions '2d'"),
        ({"image_frame": {"line": 9}}, r"image_frame: \['line'\] unknown"),
        ({"image_frame": {"row_end": -1}}, "image_frame.row_end: -1 is no token id"),
        ({"image_frame": {"row_end": 50}}, "image_frame: 50 is outside the backbone's vocabulary of 50"),
        ({"image_frame": {"between_rows": "x"}}, "image_frame.between_rows: 'x' is no token id"),
        ({"image_frame": {"row_end": 9, "between_rows": 9}}, "image_frame: .* stand both behind a row; give one"),
        ({"image_frame": {"between_rows": 50}}, "image_frame: 50 is outside the backbone's vocabulary of 50"),
        ({"code_pixels": 0}, "code_pixels: 0 .*whole number"),
        ({"image_frame": {"after": 9}}, "image_frame.after: 9 is no list of token ids"),
        ({"image_frame": {"before": {"4by4": [9]}}}, "image_frame.before: '4by4' is no grid"),
        ({"image_frame": {"before": [9]}}, r"image_frame.before: \[9\] must be a mapping of grids"),
        ({"image_frame": {"row_end": 9}, "prediction": {"order": "rows"}}, "prediction: 'rows' with merge 'one' does not go"),
    ],
)  # fmt: skip
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(**{"positions": "1d", **changes})
