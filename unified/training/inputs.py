"""The data of a run, checked before the first step and compared when the run resumes."""

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import datasets
import numpy as np
from accelerate import Accelerator
from torch import nn

from unified.config import UnifiedConfig, Vocabulary
from unified.data.batches import Source
from unified.prediction.frame import image_length
from unified.prediction.merge import Grid
from unified.prediction.plan import RASTER, Prediction
from unified.prompts import PromptFormat
from unified.training.tensor_parallel import data_rank
from unified_tokenizers import TextTokenizer

SPELT = 2.5  # bytes a token, below which most words are spelt


def code_grids(rows: datasets.Dataset) -> list[Grid]:
    """Sizes of the code grids in rows of a codes cache, each once, sorted."""
    sizes = rows.select_columns(["height", "width"])[:]
    unique = np.unique(np.stack([sizes["height"], sizes["width"]], axis=1), axis=0)
    return [(int(height), int(width)) for height, width in unique]


def check_grids(grids: Iterable[Grid], patch_sizes: Iterable[int], prediction: Prediction = RASTER) -> None:
    """Raises ValueError if a patch size of the schedule or a window of the merge does not divide a grid of the data, or the
    order does not fit it.
    """
    side = prediction.merge.side
    for height, width in grids:
        if height < 1 or width < 1:
            raise ValueError(f"codes: an image has the height {height} and the width {width}; encode the images again.")
        if height % side or width % side:
            raise ValueError(
                f"prediction.window: {side} does not divide the code grid {height}x{width} of the data; use a divisor of its "
                "sides, or encode the images at another size."
            )
        prediction.plan((height // side, width // side))
        for size in patch_sizes:
            if size > 1 and prediction.frame is not None:
                raise ValueError(
                    f"schedule.patch_sizes: {size} leaves no place for the tokens between codes (image_frame); use 1 alone."
                )
            if height % size or width % size:
                raise ValueError(
                    f"schedule.patch_sizes: {size} does not divide the code grid {height}x{width} of the data; use divisors of "
                    "its sides, or encode the images at another size."
                )


def check_lengths(
    rows: datasets.Dataset, tokenizer: TextTokenizer | None, config: UnifiedConfig, features: int = 0
) -> None:
    """Raises ValueError if a caption, or a class without a tokenizer, and its image need more positions than there are.

    ``features`` are those of an image that is read by them.
    """
    limit = getattr(config.text_config, "max_position_embeddings", None)
    if limit is None:
        return
    if tokenizer is None:
        height, width = max(code_grids(rows), key=lambda grid: grid[0] * grid[1])
        if height * width + 1 > limit:
            raise ValueError(
                f"max_position_embeddings: the backbone has {limit} positions, an image of {height}x{width} codes needs "
                f"{height * width + 1}; raise it in model.architecture, or encode the images at a smaller size."
            )
        return
    columns = rows.select_columns(["height", "width", "caption"])[:]
    longest, prompts = 0, PromptFormat.of(config)
    for height, width, caption in zip(columns["height"], columns["width"], columns["caption"], strict=True):
        grid = (int(height), int(width))
        image = max(image_length(config, grid), features) + 4  # between <bos>, <boi>, <eoi>, <eos>
        # Shorter ones fit, as every token has at least one byte.
        if image + len(prompts.template.encode()) + len(str(caption).encode()) >= limit:
            longest = max(longest, image + len(prompts.caption_ids(str(caption), tokenizer, grid)))
    if longest > limit:
        raise ValueError(
            f"max_position_embeddings: the backbone has {limit} positions, the longest row of the data needs {longest}; raise it "
            "in model.architecture, shorten captions, or encode the images at a smaller size."
        )


def add_grids(config: UnifiedConfig, grids: Iterable[Grid], fixed: bool) -> None:
    """Add the data's grids to those that the model samples.

    Raises:
        ValueError: if there are new ones and the model is ``fixed``, as the base of an adapter is.
    """
    known = [list(grid) for grid in config.image_grids or []]
    new = [list(grid) for grid in grids if list(grid) not in known]
    if fixed and known and new:
        raise ValueError(
            f"model.pipeline: it samples the code grids {known}, the data also has {new}; encode the images at one of its "
            "sizes, or train without lora."
        )
    config.image_grids = known + new


def bytes_per_token(source: Source, tokenizer: TextTokenizer, vocabulary: Vocabulary, rows: int = 32) -> float:
    """Bytes of text that a text token of a source stands for, over its first rows; infinity if they have no text.

    About 4 where words are tokens; a tokenizer that does not know the words of a text spells them, at 1 to 2.
    """
    rng, length, tokens = np.random.default_rng(0), 0, 0
    v = vocabulary
    special = {v.boi_token_id, v.eoi_token_id, v.bos_token_id, v.pad_token_id, *v.eos_token_ids}
    for row in range(min(rows, len(source.rows))):
        ids = source.sequence(source.rows[row], rng).input_ids.tolist()
        text = [token for token in ids if token < v.text_vocab_size and token not in special]
        length, tokens = length + len(tokenizer.decode(text).encode()), tokens + len(text)
    return length / tokens if tokens else math.inf


def describe_inputs(
    rows: Mapping[str, datasets.Dataset | None],
    model: nn.Module,
    accelerator: Accelerator,
    tokenizer: TextTokenizer | None,
) -> dict[str, Any]:
    """What a resumed run has to share with its checkpoint besides the settings: data, processes, frozen weights."""
    described: dict[str, Any] = {
        "num_processes": data_rank(accelerator)[1],
        "mixed_precision": accelerator.mixed_precision,  # accelerate launch may set it
        "text_tokenizer": None if tokenizer is None else tokenizer.fingerprint,
    }
    described |= {name: [len(part), part._fingerprint] for name, part in rows.items() if part is not None}
    frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
    if frozen:
        digest = hashlib.sha256()
        for name, parameter in frozen:  # a sample of every tensor is enough: training changes all of it
            values = parameter.detach().flatten()
            digest.update(f"{name} {tuple(parameter.shape)}".encode())
            digest.update(values[:: max(1, len(values) // 1024)].float().cpu().numpy().tobytes())
        described["frozen_weights"] = digest.hexdigest()[:16]
    return described
