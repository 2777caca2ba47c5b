"""From sequences to the positions that a model is fed: the data layer's last step, on the CPU, before collation.

A position of the backbone holds a text token or a window of image codes. Everything that a forward pass needs is decided
here, so that nothing in it depends on the values of its input: which ids enter a position, what is predicted for it, its
rotary coordinates, and flat indices of the image positions and of the supervised ones.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from unified.config import UnifiedConfig, Vocabulary
from unified.prediction.coordinates import span_offsets
from unified.prediction.merge import ONE, Grid, Merge, windows
from unified.prediction.order import ORDERS
from unified.sequence import IGNORE, TokenSequence


@dataclass
class Row:
    """Positions of one sequence, or of several that are packed; S positions of at most P ids each.

    Attributes:
        input_ids: ``(S, P)``, the text id in column 0 or the codes of a window; -100 in unused columns.
        labels: ``(S, P)``, the ids to be predicted for each position (by the one before it); -100 where there are none.
        positions: ``(S, 2)`` float row and column for the rotary embedding.
        is_image: ``(S,)``, True where codes enter.
        images: number of images.
        document_ids: ``(S,)`` for packed rows.
    """

    input_ids: Tensor
    labels: Tensor
    positions: Tensor
    is_image: Tensor
    images: int
    document_ids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.input_ids)


class Counts(NamedTuple):
    """What a batch holds, counted once; ``weight`` is the normaliser of its loss (see :func:`count`)."""

    images: int
    positions: int
    text_targets: int
    image_targets: int
    weight: float


def arrange(sequence: TokenSequence, config: UnifiedConfig, order: str = "raster", merge: Merge = ONE) -> Row:
    """Turn a sequence into positions: text as it is, every image in the given order with its codes merged.

    A window is supervised if all of its codes are. Nothing predicts the first position.

    Args:
        sequence: ids, labels and the grid of every image.
        config: of the model; gives the vocabulary and the coordinates.
        order: a name in :data:`unified.prediction.order.ORDERS`.
        merge: how codes enter.

    Raises:
        ValueError: if image spans and grids disagree, a span has no ``<boi>`` before it, an id lies beyond the codebook, or
            the merge does not divide a grid.
    """
    columns = merge.side**2 if sequence.image_grids else 1
    ids, labels, positions, is_image = [], [], [], []
    base, cursor = 0.0, 0

    def add_text(stop: int) -> float:
        count = stop - cursor
        ids.append(_in_columns(sequence.input_ids[cursor:stop, None], columns))
        labels.append(_in_columns(sequence.labels[cursor:stop, None], columns))
        index = (
            torch.arange(base, base + count)[:count] if config.positions != "llamagen" else torch.full((count,), -1.0)
        )
        positions.append(index[:, None].expand(-1, 2))
        is_image.append(torch.zeros(count, dtype=torch.bool))
        return base + count

    for start, grid in find_spans(sequence, config.vocabulary):
        base = add_text(start)
        cursor = start + grid[0] * grid[1]
        cells = ORDERS[order]((grid[0] // merge.side, grid[1] // merge.side)).argsort(stable=True)
        codes, targets = (
            windows(part[None, start:cursor], grid, merge.side)[0, cells]
            for part in (sequence.input_ids, sequence.labels)
        )
        offsets, advance = offsets_of(grid, config, merge)
        ids.append(codes)
        labels.append(targets.masked_fill((targets == IGNORE).any(dim=1, keepdim=True), IGNORE))
        positions.append(offsets[cells] + (base if config.positions != "llamagen" else 0.0))
        is_image.append(torch.ones(len(cells), dtype=torch.bool))
        base += advance
    add_text(len(sequence.input_ids))
    row = Row(torch.cat(ids), torch.cat(labels), torch.cat(positions), torch.cat(is_image), len(sequence.image_grids))
    row.labels[:1] = IGNORE
    return row


def find_spans(sequence: TokenSequence, vocabulary: Vocabulary) -> list[tuple[int, Grid]]:
    """First index and grid of every image span of a sequence.

    Raises:
        ValueError: if the runs of image codes do not match the grids one to one, a span has no ``<boi>`` before it, or an
            id lies beyond the codebook.
    """
    ids = sequence.input_ids
    total = vocabulary.text_vocab_size + vocabulary.codebook_size
    if ids.numel() and int(ids.max()) >= total:
        raise ValueError(f"input_ids: {int(ids.max())} is beyond text vocabulary and codebook ({total} ids).")
    is_image = F.pad((ids >= vocabulary.text_vocab_size).long(), (1, 1))
    change = is_image.diff()
    starts, stops = (change == 1).nonzero().flatten().tolist(), (change == -1).nonzero().flatten().tolist()
    grids = sequence.image_grids
    if len(starts) != len(grids):
        raise ValueError(f"image_grids: {len(grids)} grids for {len(starts)} image spans; give one (h, w) per span.")
    for start, stop, (height, width) in zip(starts, stops, grids, strict=True):
        if stop - start != height * width:
            raise ValueError(
                f"image_grids: the span at {start} has {stop - start} codes, its grid {height}x{width} needs {height * width}."
            )
        if start == 0 or int(ids[start - 1]) != vocabulary.boi_token_id:
            raise ValueError(f"input_ids: the image span at {start} is not preceded by <boi>.")
    return list(zip(starts, grids, strict=True))


def offsets_of(grid: Grid, config: UnifiedConfig, merge: Merge = ONE) -> tuple[Tensor, float]:
    """Coordinates ``(n, 2)`` of an image's windows after ``<boi>``, and how far the index of the text moves on."""
    positions = "2d" if config.positions == "llamagen" else config.positions
    return span_offsets(grid, merge.side, positions, config.coarse_positions, config.normalized_range)


def pack(rows: Iterable[Row], max_length: int) -> list[Row]:
    """Concatenate rows into rows of at most ``max_length`` positions with one document id each.

    The longest goes first, each into the fullest row that still has room for it (best-fit decreasing: at most 11/9 of the
    fewest rows possible, plus one). Inside a row the documents keep their order.

    Raises:
        ValueError: if a single row is longer than ``max_length``.
    """
    documents = list(rows)
    packed: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(documents)), key=lambda i: -len(documents[i])):
        size = len(documents[index])
        if size > max_length:
            raise ValueError(f"max_length: {max_length} is shorter than a sequence of {size} positions; raise it.")
        fitting = [number for number, free in enumerate(room) if free >= size]
        if not fitting:
            fitting = [len(packed)]
            packed.append([])
            room.append(max_length)
        best = min(fitting, key=room.__getitem__)
        packed[best].append(index)
        room[best] -= size
    return [_concatenate([documents[index] for index in sorted(members)]) for members in packed]


def _concatenate(documents: list[Row]) -> Row:
    columns = max(document.input_ids.shape[1] for document in documents)
    return Row(
        torch.cat([_in_columns(document.input_ids, columns) for document in documents]),
        torch.cat([_in_columns(document.labels, columns) for document in documents]),
        torch.cat([document.positions for document in documents]),
        torch.cat([document.is_image for document in documents]),
        sum(document.images for document in documents),
        torch.cat([torch.full((len(document),), number) for number, document in enumerate(documents)]),
    )


def collate(rows: Sequence[Row], vocabulary: Vocabulary, multiple: int = 1) -> dict[str, Tensor]:
    """Pad rows on the right into a batch: the keyword arguments of :class:`unified.UnifiedForCausalLM`.

    Args:
        rows: of :func:`arrange` or :func:`pack`; different merges may stand side by side.
        vocabulary: gives the id of padding.
        multiple: the length of a row and of every list of indices is padded to a multiple of it, so that a compiler meets
            few shapes.

    Returns:
        ``input_ids`` and ``labels`` of shape ``(B, S)``, or ``(B, S, P)`` where windows enter; ``positions (B, S, 2)``; flat
        indices into ``B * S``: ``image_inputs``, the positions that codes enter, ``text_targets`` and ``image_targets``, the
        supervised ones (B * S stands for none); ``document_ids (B, S)`` (-1 on padding) if the rows are packed.

    Raises:
        ValueError: if some rows are packed and others are not.
    """
    longest = max(map(len, rows))
    length, columns = longest + -longest % multiple, max(row.input_ids.shape[1] for row in rows)

    def stack(parts: Iterable[Tensor], fill: float) -> Tensor:
        return torch.stack([F.pad(t, (0, 0) * (t.ndim - 1) + (0, length - len(t)), value=fill) for t in parts])

    input_ids = stack((_in_columns(row.input_ids, columns) for row in rows), IGNORE)
    padding = (input_ids == IGNORE).all(dim=2)
    input_ids[..., 0] = input_ids[..., 0].masked_fill(padding, vocabulary.pad_token_id)
    labels = stack((_in_columns(row.labels, columns) for row in rows), IGNORE)
    of_image = labels[..., 0] >= vocabulary.text_vocab_size
    batch = {
        "input_ids": input_ids if columns > 1 else input_ids[..., 0],
        "labels": labels if columns > 1 else labels[..., 0],
        "positions": stack((row.positions for row in rows), 0.0),
        "image_inputs": _indices(stack((row.is_image for row in rows), False), multiple),
        "text_targets": _indices((labels[..., 0] != IGNORE) & ~of_image, multiple),
        "image_targets": _indices(of_image, multiple),
    }
    packed = [row.document_ids for row in rows if row.document_ids is not None]
    if packed:
        if len(packed) != len(rows):
            raise ValueError(f"rows: {len(packed)} of {len(rows)} are packed; pack all of them or none.")
        batch["document_ids"] = stack(packed, -1)
    return batch


def count(rows: Sequence[Row], config: UnifiedConfig) -> Counts:
    """Count a batch: images, positions, targets, and the weight of its supervised positions.

    ``loss * weight`` is a plain sum over positions, so that means of parts can be put together exactly: a text position
    weighs ``text_loss_weight``, an image position ``image_loss_weight``, times the number of its codes if
    ``loss_normalization`` is ``token``.
    """
    labels = [row.labels for row in rows]
    of_image = [each[:, 0] >= config.vocabulary.text_vocab_size for each in labels]
    images = sum(int(mask.sum()) for mask in of_image)
    texts = sum(int((each[:, 0] != IGNORE).sum()) for each in labels) - images
    codes = images
    if config.loss_normalization == "token":
        codes = sum(int((each[mask] != IGNORE).sum()) for each, mask in zip(labels, of_image, strict=True))
    weight = config.text_loss_weight * texts + config.image_loss_weight * codes
    return Counts(sum(row.images for row in rows), sum(map(len, rows)), texts, images, weight)


def _in_columns(values: Tensor, columns: int) -> Tensor:
    """``(S, P)`` with unused columns up to ``columns``."""
    missing = columns - values.shape[1]
    return F.pad(values, (0, missing), value=IGNORE) if missing else values


def _indices(where: Tensor, multiple: int) -> Tensor:
    """Flat indices of True, padded to a multiple with the index behind the last position."""
    found = where.flatten().nonzero().flatten()
    return F.pad(found, (0, -len(found) % multiple), value=where.numel())
