"""Pairs of a pipeline's own images: ranking, codes that are kept as they were drawn, and what is refused."""

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import generators

import prepare_pairs as recipe
from unified.data.code_cache import load_codes
from unified.data.pairs import pair_sequence, save_pairs
from unified.sequence import ImageSegment, TextSegment, build_sequence
from unified_tokenizers.images import to_pil


@pytest.mark.parametrize(
    "rewards, most, pairs",
    [
        ([0.0, 1.0, 0.5, 0.2], 1, [(1, 0)]),
        ([0.0, 1.0, 0.5, 0.2], 3, [(1, 0), (2, 3)]),  # no image is in two pairs
        ([1.0, 0.5, 0.5, 0.0], 2, [(0, 3)]),
        ([0.3, 0.3], 1, []),
        ([2.0, 1.0, 0.0], 2, [(0, 2)]),
    ],
)
def test_the_best_is_paired_with_the_worst(rewards, most, pairs):
    assert recipe.ranked_pairs(rewards, most) == pairs


def test_saved_pairs_are_trained_on_as_they_were_drawn(tmp_path, pipeline):
    chosen, rejected = torch.arange(8).view(2, 4), torch.arange(8, 16).view(4, 2)
    save_pairs(
        pipeline.image_tokenizer, tmp_path / "pairs", [("a red apple", chosen.numpy(), rejected.numpy())], "a test"
    )
    rows = load_codes(tmp_path / "pairs", "train", pipeline.image_tokenizer.fingerprint, "pairs").with_format(None)
    vocabulary, text = pipeline.model.config.vocabulary, pipeline.text_tokenizer.encode("a red apple")
    sequence = pair_sequence(rows[0], None, pipeline.text_tokenizer, vocabulary)
    for found, codes in ((sequence, chosen), (sequence.rejected, rejected)):
        own = build_sequence([TextSegment(text, loss=False), ImageSegment(codes)], vocabulary)
        assert found.input_ids.tolist() == own.input_ids.tolist() and found.labels.tolist() == own.labels.tolist()
    with pytest.raises(FileExistsError):
        save_pairs(
            pipeline.image_tokenizer, tmp_path / "pairs", [("a red apple", chosen.numpy(), rejected.numpy())], "a test"
        )
    with pytest.raises(ValueError, match="pairs: the list is empty"):
        save_pairs(pipeline.image_tokenizer, tmp_path / "none", [], "a test")


@pytest.fixture
def module(monkeypatch):
    """A module of rewards: how bright an image is, and one that sees no difference."""
    made = types.ModuleType("own_rewards")
    made.bright = lambda images, prompts: [float(np.asarray(image).mean()) for image in images]
    made.same = lambda images, prompts: [1.0] * len(images)
    monkeypatch.setitem(sys.modules, "own_rewards", made)


def arguments(base: Path, source: str, out: Path, *further: object) -> list[str]:
    return [
        "--pipeline", str(base), "--prompts", source, "--num-prompts", "3", "--images-per-prompt", "4", "--pairs-per-prompt", "2",
        "--reward", "own_rewards:bright", "--batch-size", "5", "--out", str(out), *map(str, further),
    ]  # fmt: skip


def test_the_recipe_ranks_what_the_pipeline_draws(module, pipeline, picture_source, tmp_path):
    """Rewards of the saved codes are those of the lines; codes are those of the pipeline with the same seeds."""
    pipeline.model.config.image_grids = [[4, 4]]
    pipeline.save_pretrained(tmp_path / "base")
    recipe.main(arguments(tmp_path / "base", picture_source, tmp_path / "pairs", "--guidance-scale", 1))
    lines = [json.loads(line) for line in (tmp_path / "pairs" / "pairs.jsonl").read_text().splitlines()]
    rows = load_codes(tmp_path / "pairs", "train", pipeline.image_tokenizer.fingerprint, "pairs").with_format(None)
    assert len(rows) == len(lines) == 6 and (tmp_path / "pairs" / "pairs.png").stat().st_size > 1000
    summary = json.loads((tmp_path / "pairs" / "summary.json").read_text())
    assert (summary["pairs"], summary["prompts"], summary["sampling"]) == (6, 3, {"guidance_scale": 1.0})

    seeds = np.random.default_rng((0, 1)).integers(2**62, size=12).tolist()
    captions = list(dict.fromkeys(line["caption"] for line in lines))
    for number, caption in enumerate(captions):
        own = generators(*seeds[4 * number : 4 * number + 4])
        drawn = pipeline([caption] * 4, generator=own, guidance_scale=1.0, output_type="codes").images
        brightness = [float(np.asarray(image).mean()) for image in to_pil(pipeline.image_tokenizer.decode(drawn))]
        for better, worse in recipe.ranked_pairs(brightness, 2):
            row = next(row for row in rows if row["codes"] == [*drawn[better].flatten(), *drawn[worse].flatten()])
            line = lines[row["source_row"]]
            assert (line["chosen_reward"], line["rejected_reward"]) == pytest.approx(
                (brightness[better], brightness[worse])
            )


@pytest.mark.parametrize(
    "change, message",
    [
        (["--num-prompts", 100], "num_prompts: 100, but .* different captions"),
        (["--images-per-prompt", 1], "images_per_prompt: 1 must be at least 2"),
        (["--reward", "own_rewards:same"], "gives all images of a caption the same"),
        (["--out", "."], "exists; choose another folder"),
    ],
)
def test_what_is_refused(module, pipeline, picture_source, tmp_path, change, message):
    pipeline.model.config.image_grids = [[4, 4]]
    pipeline.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=message):
        recipe.main(arguments(tmp_path / "base", picture_source, tmp_path / "pairs", *change))
    assert not (tmp_path / "pairs").exists()
