"""Segments of text and image <-> one sequence of ids; batches of sequences.

A sequence reads ``<bos> text <boi> codes <eoi> text ...``. ``labels`` copy the ids where a token is to be learned and
hold -100 elsewhere; the shift by one position happens inside the model.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unified.config import Vocabulary

IGNORE = -100


@dataclass(frozen=True)
class TextSegment:
    """Text ids; ``loss`` says whether they are learned."""

    ids: Sequence[int]
    loss: bool = True


@dataclass(frozen=True, eq=False)
class ImageSegment:
    """Image codes ``(h, w)`` in [0, K); ``loss`` says whether they are learned."""

    codes: Tensor
    loss: bool = True


Segment = TextSegment | ImageSegment


@dataclass
class TokenSequence:
    """``input_ids`` and ``labels`` of shape ``(T,)``, the grid of every image span, and the document of every token."""

    input_ids: Tensor
    labels: Tensor
    image_grids: list[tuple[int, int]]
    document_ids: Tensor | None = None


def build_sequence(segments: Iterable[Segment], vocabulary: Vocabulary, end: bool = False) -> TokenSequence:
    """Lay segments out as one sequence that starts with ``<bos>`` (if the backbone has one).

    ``<boi>`` is learned if the text before it is, so that interleaved data teach when to sample; ``<eoi>`` is learned with
    its image. ``end`` appends ``<eos>``, learned as the last segment is.

    Raises:
        ValueError: if text ids or codes leave their ranges, or codes are not ``(h, w)`` integers.
    """
    start = [] if vocabulary.bos_token_id is None else [vocabulary.bos_token_id]
    ids = [torch.tensor(start, dtype=torch.int64)]
    learn = [torch.zeros(len(start), dtype=torch.bool)]
    grids: list[tuple[int, int]] = []
    learned = text_learned = False
    for segment in segments:
        learned = segment.loss
        if isinstance(segment, TextSegment):
            part = torch.tensor(segment.ids, dtype=torch.int64)
            _check_range("text ids", part, vocabulary.text_vocab_size)
            learn.append(torch.full((len(part),), learned))
            text_learned = learned
        else:
            codes = segment.codes
            if codes.ndim != 2 or codes.is_floating_point() or codes.numel() == 0:
                raise ValueError(f"codes: need integers of shape (h, w), got {codes.dtype} {tuple(codes.shape)}.")
            _check_range("codes", codes, vocabulary.codebook_size)
            part = torch.nn.functional.pad(codes.reshape(-1).long() + vocabulary.text_vocab_size, (1, 1))
            part[0], part[-1] = vocabulary.boi_token_id, vocabulary.eoi_token_id
            learn.append(torch.full((len(part),), learned))
            learn[-1][0] = text_learned
            grids.append((codes.shape[0], codes.shape[1]))
        ids.append(part)
    if end:
        if vocabulary.eos_token_id is None:
            raise ValueError("end: the backbone has no eos token id; set one in its configuration.")
        ids.append(torch.tensor([vocabulary.eos_token_id]))
        learn.append(torch.tensor([learned]))
    input_ids = torch.cat(ids)
    labels = torch.where(torch.cat(learn), input_ids, IGNORE)
    return TokenSequence(input_ids, labels, grids)


def split_sequence(input_ids: Tensor, image_grids: Sequence[tuple[int, int]], vocabulary: Vocabulary) -> list[Segment]:
    """The inverse of :func:`build_sequence` for the ids ``(T,)``: segments without ``<bos>``, ``<boi>`` and ``<eoi>``."""
    frame = {vocabulary.boi_token_id, vocabulary.eoi_token_id}
    segments: list[Segment] = []
    text: list[int] = []
    grids = iter(image_grids)
    ids = input_ids.tolist()
    position = 1 if ids and ids[0] == vocabulary.bos_token_id else 0
    while position < len(ids):
        token = ids[position]
        if token < vocabulary.text_vocab_size:
            if token not in frame:
                text.append(token)
            position += 1
            continue
        if text:
            segments.append(TextSegment(text))
            text = []
        height, width = next(grids)
        codes = input_ids[position : position + height * width] - vocabulary.text_vocab_size
        segments.append(ImageSegment(codes.reshape(height, width)))
        position += height * width
    if text:
        segments.append(TextSegment(text))
    return segments


def collate(sequences: Sequence[TokenSequence], vocabulary: Vocabulary) -> dict[str, Tensor]:
    """Pad sequences on the right into a batch for :class:`unified.UnifiedForCausalLM`.

    Returns:
        ``input_ids``, ``labels``, ``attention_mask`` of shape ``(B, T)``; ``image_grids`` ``(N, 2)``, one row per image
        span in order of appearance; ``document_ids (B, T)`` (-1 on padding) if the sequences are packed.
    """
    length = max(len(sequence.input_ids) for sequence in sequences)

    def stack(tensors: list[Tensor], fill: int) -> Tensor:
        return torch.stack([torch.nn.functional.pad(t, (0, length - len(t)), value=fill) for t in tensors])

    grids = [grid for sequence in sequences for grid in sequence.image_grids]
    batch = {
        "input_ids": stack([s.input_ids for s in sequences], vocabulary.pad_token_id),
        "labels": stack([s.labels for s in sequences], IGNORE),
        "attention_mask": stack([torch.ones_like(s.input_ids) for s in sequences], 0),
        "image_grids": torch.tensor(grids, dtype=torch.int64).reshape(-1, 2),
    }
    packed = [s.document_ids for s in sequences if s.document_ids is not None]
    if packed:
        if len(packed) != len(sequences):
            raise ValueError(f"sequences: {len(packed)} of {len(sequences)} are packed; pack all of them or none.")
        batch["document_ids"] = stack(packed, -1)
    return batch


def pack(sequences: Iterable[TokenSequence], max_length: int) -> list[TokenSequence]:
    """Concatenate sequences into rows of at most ``max_length`` tokens with one document id each.

    The longest goes first, each into the fullest row that still has room for it (best-fit decreasing: at most 11/9 of the
    fewest rows possible, plus one). Inside a row the sequences keep their order.

    Raises:
        ValueError: if a single sequence is longer than ``max_length``.
    """
    sequences = list(sequences)
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(sequences)), key=lambda i: -len(sequences[i].input_ids)):
        size = len(sequences[index].input_ids)
        if size > max_length:
            raise ValueError(f"max_length: {max_length} is shorter than a sequence of {size} tokens; raise it.")
        fitting = [row for row, free in enumerate(room) if free >= size]
        if not fitting:
            fitting = [len(rows)]
            rows.append([])
            room.append(max_length)
        best = min(fitting, key=room.__getitem__)
        rows[best].append(index)
        room[best] -= size
    return [_concatenate([sequences[index] for index in sorted(row)]) for row in rows]


def _concatenate(row: list[TokenSequence]) -> TokenSequence:
    labels = [torch.cat([torch.tensor([IGNORE]), s.labels[1:]]) for s in row]  # nothing predicts a document's start
    documents = [torch.full_like(s.input_ids, index) for index, s in enumerate(row)]
    grids = [grid for s in row for grid in s.image_grids]
    return TokenSequence(torch.cat([s.input_ids for s in row]), torch.cat(labels), grids, torch.cat(documents))


def _check_range(name: str, values: Tensor, size: int) -> None:
    if values.numel() and not (values.min() >= 0 and values.max() < size):
        low, high = int(values.min()), int(values.max())
        raise ValueError(f"{name}: values {low}..{high} leave [0, {size}); made for another layout?")
