"""Rows of a codes cache as sequences: caption and image, or image and caption."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from unified.config import Vocabulary
from unified.prompts import PLAIN, PromptFormat
from unified.sequence import FeatureSegment, ImageSegment, Segment, TextSegment, TokenSequence, build_sequence
from unified_tokenizers import TextTokenizer


def captioned_sequence(
    row: dict[str, Any],
    rng: np.random.Generator,
    text_tokenizer: TextTokenizer,
    vocabulary: Vocabulary,
    caption_dropout: float = 0.0,
    code_noise: float = 0.0,
    train_on_captions: bool = False,
    captioning: float = 0.0,
    prompts: PromptFormat = PLAIN,
    feature_size: tuple[int, int] | None = None,
) -> TokenSequence:
    """``<bos> caption <boi> codes <eoi>``, or ``<bos> <boi> codes <eoi> caption <eos>`` with the caption in the loss.

    Args:
        row: ``caption``, flat ``codes``, ``height`` and ``width`` of the grid.
        rng: source of the row's random choices.
        text_tokenizer, vocabulary: of the model.
        caption_dropout: share of rows with an empty caption, for classifier-free guidance.
        code_noise: see :func:`add_code_noise`.
        train_on_captions: whether captions before an image are in the loss.
        captioning: share of rows with the image first.
        prompts: how the model writes a caption in front of an image, and no caption.
        feature_size: P and F of the row's ``features``, which stand for the codes where the image comes first.

    Raises:
        ValueError: if the caption is no text, or the codes are no whole numbers or not as many as the grid has.
    """
    dropped, captioned = (bool(rng.random() < share) for share in (caption_dropout, captioning))
    caption = text_of(row, "caption")
    image = grids_of(row["codes"], [row["height"]], [row["width"]])[0]
    segments: list[Segment]
    if captioned:
        read: Segment = ImageSegment(image, loss=False)
        if feature_size is not None:
            (read,) = features_of(row["features"], 1, feature_size)
        segments = [read, TextSegment(text_tokenizer.encode(caption))]
    else:
        grid = (image.shape[0], image.shape[1])
        ids = prompts.caption_ids(caption, text_tokenizer, grid)
        ids = prompts.null_ids(text_tokenizer, grid, len(ids)) if dropped else ids
        segments = [TextSegment(ids, loss=train_on_captions), ImageSegment(image)]
    sequence = build_sequence(segments, vocabulary, end=captioned)
    if code_noise:
        add_code_noise(sequence, vocabulary, code_noise, rng)
    return sequence


def text_of(row: Mapping[str, Any], column: str) -> str:
    """The text in a column. Raises ValueError for anything else: None is not the word "None"."""
    value = row[column]
    if not isinstance(value, str):
        raise ValueError(f"{column}: {value!r} is no text; leave the row out, or encode the source again.")
    return str(value)  # NumPy has its own strings


def grids_of(codes: Any, heights: Sequence[Any], widths: Sequence[Any]) -> list[torch.Tensor]:
    """The codes of several images, one after the other, as int64 grids.

    Raises:
        ValueError: if they are no whole numbers, or not as many as the grids have.
    """
    flat = np.asarray(codes)
    if flat.ndim != 1 or (flat.size and flat.dtype.kind not in "iu"):
        raise ValueError(f"codes: {flat.dtype} {flat.shape} are no list of whole numbers; encode the images again.")
    grids = list(zip(heights, widths, strict=False))
    if len(heights) != len(widths) or any(None in grid or min(grid) < 1 for grid in grids):
        raise ValueError(
            f"codes: heights {list(heights)} and widths {list(widths)} are no grids; encode the images again."
        )
    sizes = [int(height) * int(width) for height, width in grids]
    if sum(sizes) != len(flat):
        raise ValueError(f"codes: {len(flat)} codes for grids of {sum(sizes)}; encode the images again.")
    parts = torch.tensor(flat.astype(np.int64)).split(sizes)
    return [part.reshape(int(h), int(w)) for part, (h, w) in zip(parts, grids, strict=True)]


def features_of(values: Any, images: int, size: tuple[int, int]) -> list[FeatureSegment]:
    """The flat features of several images, one after the other, each ``(P, F)`` of ``size``, as segments.

    Raises:
        ValueError: if they are not those of so many images.
    """
    flat = np.asarray(values, dtype=np.float16)
    if flat.size != images * size[0] * size[1]:
        raise ValueError(
            f"features: {flat.size} numbers for {images} images of {size[0]} x {size[1]}; encode the images again."
        )
    return [FeatureSegment(torch.from_numpy(each)) for each in flat.reshape(images, *size)]


def add_code_noise(sequence: TokenSequence, vocabulary: Vocabulary, limit: float, rng: np.random.Generator) -> None:
    """Replace input codes at random, at a rate sampled from [0, ``limit``]; the labels stay.

    A small set of images can be told apart by their first codes alone: noise makes the model look at the caption, and
    forgives its own slips when it samples.
    """
    is_code = (sequence.input_ids >= vocabulary.text_vocab_size).numpy()
    replaced = is_code & (rng.random(len(is_code)) < rng.uniform(0, limit))
    codes = rng.integers(vocabulary.codebook_size, size=int(replaced.sum())) + vocabulary.text_vocab_size
    sequence.input_ids[torch.from_numpy(replaced)] = torch.from_numpy(codes)


def text_sequence(
    row: dict[str, Any],
    rng: np.random.Generator,
    text_tokenizer: TextTokenizer,
    vocabulary: Vocabulary,
    text_column: str = "text",
    max_length: int = 512,
) -> TokenSequence:
    """``<bos> text <eos>``, all in the loss; a longer text is cut to ``max_length`` tokens, without ``<eos>``.

    Raises:
        ValueError: if there is no text.
    """
    ids = text_tokenizer.encode(text_of(row, text_column))
    room = max_length - (vocabulary.bos_token_id is not None)
    return build_sequence([TextSegment(ids[:room])], vocabulary, end=len(ids) < room)
