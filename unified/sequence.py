"""Segments of text and image -> one sequence of ids.

A sequence reads ``<bos> text <boi> codes <eoi> text ...``; of a model with a vision encoder, an image that is only read has
features in place of codes. ``labels`` copy the ids of supervised tokens and hold -100
elsewhere; the shift by one position happens inside the model.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from reprlib import repr as short

import numpy as np
import torch
from torch import Tensor

from unified.config import Vocabulary

_NO_INTEGERS = (torch.bool, torch.complex32, torch.complex64, torch.complex128)
IGNORE = -100  # in labels: not supervised; in columns of codes: unused


@dataclass(frozen=True)
class TextSegment:
    """Text ids, supervised if ``loss``."""

    ids: Sequence[int]
    loss: bool = True


@dataclass(frozen=True, eq=False)
class ImageSegment:
    """Image codes ``(h, w)`` in [0, K), supervised if ``loss``."""

    codes: Tensor
    loss: bool = True


@dataclass(frozen=True, eq=False)
class FeatureSegment:
    """An image that is read: features ``(P, F)`` of a vision encoder, of which each takes a position; never in the loss."""

    features: Tensor


Segment = TextSegment | ImageSegment | FeatureSegment


@dataclass
class TokenSequence:
    """``input_ids`` and ``labels`` of shape ``(T,)``, and the grid of every image span.

    ``seed`` chooses the permutation of codes, for a model that predicts them in any order: one seed for all images, or a
    list with that of each permutation, as images are sampled; ``condition`` is the class of a class-conditional model, whose
    embedding takes the place of ``<boi>``; ``rejected`` is the other sequence of a pair of which this one is preferred;
    ``features`` are the images that are read, each with the index of its first position, whose ids are padding.
    """

    input_ids: Tensor
    labels: Tensor
    image_grids: list[tuple[int, int]]
    seed: int | list[int] = 0
    condition: int | None = None
    rejected: "TokenSequence | None" = None
    features: list[tuple[int, FeatureSegment]] = field(default_factory=list)


def build_sequence(segments: Iterable[Segment], vocabulary: Vocabulary, end: bool = False) -> TokenSequence:
    """Join segments into one sequence that starts with ``<bos>`` (if the backbone has one).

    ``<boi>`` is supervised with the text before it, so that interleaved data teach when to open an image; ``<eoi>`` with
    its image; ``<eos>``, which ``end`` appends, with the last segment. Nothing of an image that is read is supervised.

    Raises:
        ValueError: if text ids or codes are no integers, leave their ranges or have another shape, or a segment is none.
    """
    start = [] if vocabulary.bos_token_id is None else [vocabulary.bos_token_id]
    ids = [np.array(start, dtype=np.int64)]
    in_loss = [np.zeros(len(start), dtype=bool)]
    grids: list[tuple[int, int]] = []
    features: list[tuple[int, FeatureSegment]] = []
    supervised = text_supervised = False
    for segment in segments:
        if isinstance(segment, FeatureSegment):
            if segment.features.ndim != 2 or not segment.features.is_floating_point() or not len(segment.features):
                kind = f"{segment.features.dtype} {tuple(segment.features.shape)}"
                raise ValueError(f"features: need floats of shape (P, F), got {kind}.")
            features.append((sum(map(len, ids)) + 1, segment))
            padding = [vocabulary.pad_token_id] * len(segment.features)
            ids.append(np.array([vocabulary.boi_token_id, *padding, vocabulary.eoi_token_id], dtype=np.int64))
            in_loss.append(np.zeros(len(ids[-1]), dtype=bool))
            supervised = text_supervised = False
            continue
        if not isinstance(segment, TextSegment | ImageSegment):
            raise ValueError(f"segments: {short(segment)} is neither a TextSegment nor an ImageSegment.")
        supervised = segment.loss
        if isinstance(segment, TextSegment):
            given = np.array(segment.ids)
            if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
                raise ValueError(f"text ids: need whole numbers of shape (n,), got {given.dtype} {given.shape}.")
            part = given.astype(np.int64)
            _check_range("text ids", part, vocabulary.text_vocab_size)
            in_loss.append(np.full(len(part), supervised))
            text_supervised = supervised
        else:
            codes = segment.codes
            if not isinstance(codes, Tensor):
                raise ValueError(f"codes: need a tensor of shape (h, w), got {type(codes).__name__} {short(codes)}.")
            if codes.ndim != 2 or codes.dtype in _NO_INTEGERS or codes.is_floating_point() or codes.numel() == 0:
                raise ValueError(f"codes: need integers of shape (h, w), got {codes.dtype} {tuple(codes.shape)}.")
            flat = codes.cpu().numpy().reshape(-1).astype(np.int64)
            _check_range("codes", flat, vocabulary.codebook_size)
            frame = vocabulary.boi_token_id, vocabulary.eoi_token_id
            part = np.concatenate([frame[:1], flat + vocabulary.text_vocab_size, frame[1:]])
            in_loss.append(np.full(len(part), supervised))
            in_loss[-1][0] = text_supervised
            grids.append((codes.shape[0], codes.shape[1]))
        ids.append(part)
    if end:
        if vocabulary.eos_token_id is None:
            raise ValueError("end: the backbone has no eos token id; set one in its configuration.")
        ids.append(np.array([vocabulary.eos_token_id]))
        in_loss.append(np.array([supervised]))
    input_ids = np.concatenate(ids)
    labels = np.where(np.concatenate(in_loss), input_ids, IGNORE)
    return TokenSequence(torch.from_numpy(input_ids), torch.from_numpy(labels), grids, features=features)


def _check_range(name: str, values: np.ndarray, size: int) -> None:
    if values.size and not (values.min() >= 0 and values.max() < size):
        low, high = int(values.min()), int(values.max())
        raise ValueError(f"{name}: values {low}..{high} leave [0, {size}); made for another vocabulary?")
