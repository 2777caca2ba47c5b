"""From sequences to the positions that a model is fed: the data layer's last step, on the CPU, before collation.

A position of the backbone holds a text token or a window of image codes. Everything that a forward pass needs is decided
here, so that nothing in it depends on the values of its input: which ids enter a position, what is predicted and from
where, what a position sees, its rotary coordinates, and flat indices of the image positions and of the supervised ones.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unified.config import Coordinates, UnifiedConfig, Vocabulary
from unified.prediction.merge import Grid, Merge, merged_grid, windows
from unified.prediction.order import NONE, START
from unified.prediction.plan import NEVER, RASTER, Plan, Prediction, plan_offsets
from unified.sequence import IGNORE, TokenSequence
from unified_tokenizers.fields import is_whole


@dataclass
class Row:
    """Positions of one sequence, or of several that are packed; S positions of at most P ids each.

    Attributes:
        input_ids: ``(S, P)``, the text id in column 0 or the codes of a window; -100 in unused columns, and for queries.
        labels: ``(S, P)``, the ids to be predicted for each position; -100 where there are none.
        positions: ``(S, 2)`` float row and column for the rotary embedding.
        is_image: ``(S,)``, True in images: where codes enter, and queries; not the text of a frame.
        images: number of images.
        merge: how codes enter.
        sources: ``(S, m)``, the positions that predict each label, -1 for none; None where it is the one before.
        steps: ``(S, 2)``, from which step on others see a position, and up to which step it sees others; None where each
            sees all before it.
        document_ids: ``(S,)`` for packed rows.
        condition: class of a class-conditional model.
        owners: the sequence that each image is of, by its number among those of the batch.
        grids: of each image, in codes.
        is_read: ``(S,)``, True where features of images that are read enter; they count up as text does, because their
            encoder knows where they are. None without any.
        features: ``(n, F)``, what enters there.
    """

    input_ids: Tensor
    labels: Tensor
    positions: Tensor
    is_image: Tensor
    images: int
    merge: str = "one"
    sources: Tensor | None = None
    steps: Tensor | None = None
    document_ids: Tensor | None = None
    condition: int | None = None
    owners: list[int] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    is_read: Tensor | None = None
    features: Tensor | None = None

    def __len__(self) -> int:
        return len(self.input_ids)


class Counts(NamedTuple):
    """What a batch holds. ``weight`` is what its loss is divided by: ``loss * weight`` is a plain sum over positions."""

    images: int
    positions: int
    text_targets: int
    image_targets: int
    weight: float


class Batch(NamedTuple):
    """A batch of a model.

    Attributes:
        inputs: keyword arguments of the model.
        counts: what it holds.
        owners: ``(images,)``, the number of the sequence that each image is of, images in the order of their positions; empty
            unless :func:`unified.data.batches.make_batch` made it.
        grids: ``(images, 2)``, height and width of each image in codes.
        further: batches of further sequences, by the objective that asks for them.
    """

    inputs: dict[str, Any]
    counts: Counts
    owners: Tensor = torch.empty(0, dtype=torch.int64)
    grids: Tensor = torch.empty(0, 2, dtype=torch.int64)
    further: dict[str, Any] = {}  # noqa: RUF012


class _Image(NamedTuple):
    """An image of a grid: its plan, the codes ``(L, s^2)`` of each position's cell, coordinates, advance of the text, codes."""

    plan: Plan
    entered: np.ndarray
    offsets: np.ndarray
    advance: float
    codes: int


def arrange(
    sequence: TokenSequence,
    vocabulary: Vocabulary,
    coordinates: Coordinates,
    prediction: Prediction = RASTER,
    merge: Merge | None = None,
    as_sampled: bool = False,
) -> Row:
    """Turn a sequence into positions: text as it is, every image in the order of ``prediction``.

    A window is supervised if all of its codes are. Nothing predicts the first position.

    Args:
        sequence: ids, labels and the grid of every image.
        vocabulary, coordinates: of the model.
        prediction: the order of cells, and how codes enter.
        merge: how codes enter in an earlier stage of training.
        as_sampled: an image of any order in the groups in which it is sampled; training predicts its cells one by one.

    Raises:
        ValueError: if ids and labels are not as many integers, image spans and grids disagree, a span has no ``<boi>`` before
            it, an id is negative or beyond the codebook, or the merge or the order does not fit a grid.
    """
    merge = prediction.merge if merge is None else merge
    if prediction.frame is not None and merge.side > 1:
        raise ValueError(
            "schedule.patch_sizes: patches have no place for the tokens between codes (image_frame); use 1."
        )
    for name, given in (("input_ids", sequence.input_ids), ("labels", sequence.labels)):
        if given.ndim != 1 or given.dtype != torch.int64 or len(given) != len(sequence.input_ids):
            raise ValueError(
                f"{name}: need int64 ({len(sequence.input_ids)},), got {given.dtype} {tuple(given.shape)}."
            )
    ids, labels = sequence.input_ids.numpy(), sequence.labels.numpy()
    spans = image_spans(ids, sequence.image_grids, vocabulary)
    read = np.zeros(len(ids), dtype=bool)
    for start, segment in sequence.features:
        read[start : start + len(segment.features)] = True
    seed = None if not prediction.way.any_order else sequence.seed
    images = _images([grid for _, grid in spans], prediction, merge, coordinates, seed, as_sampled)
    length = len(ids) + sum(len(image.entered) - image.codes for image in images)
    shape = (length, merge.side**2 if spans else 1)
    row_ids, row_labels = np.full(shape, IGNORE), np.full(shape, IGNORE)
    positions, is_image = np.full((length, 2), -1.0, dtype=np.float32), np.zeros(length, dtype=bool)
    is_read = np.zeros(length, dtype=bool)
    sources, steps = np.full((length, prediction.way.most_sources), -1), np.empty((length, 2), dtype=np.int64)
    cursor, end, step, base = 0, 0, 0, 0.0  # in the sequence, in the row, the next step, and the index of the text
    for number in range(len(spans) + 1):
        stop = spans[number][0] if number < len(spans) else len(ids)
        text = slice(end, end + stop - cursor)
        row_ids[text, 0], row_labels[text, 0] = ids[cursor:stop], labels[cursor:stop]
        is_read[text] = read[cursor:stop]
        sources[text, 0], steps[text] = np.arange(text.start, text.stop) - 1, step + np.arange(stop - cursor)[:, None]
        if coordinates.positions != "llamagen":
            positions[text] = base + np.arange(stop - cursor)[:, None]
        step, base, end = step + stop - cursor, base + stop - cursor, text.stop
        if number == len(spans):
            break
        plan, index, offsets, advance, codes = images[number]
        image, entering = slice(end, end + len(index)), plan.cells >= 0
        values, targets = np.where(entering[:, None], ids[stop + index], IGNORE), labels[stop + index]
        targets[(targets == IGNORE).any(axis=1)] = IGNORE
        # A cell is a target at the position that it enters first.
        first = np.flatnonzero(entering)[np.unique(plan.cells[entering], return_index=True)[1]]
        repeated = np.ones(len(index), dtype=bool)
        repeated[first] = False
        targets[repeated] = IGNORE
        if plan.tokens is not None:
            values[:, 0] = np.where(entering, values[:, 0], plan.tokens)
        row_ids[image], row_labels[image], is_image[image] = values, targets, plan.tokens is None or entering
        found = np.where(plan.sources == START, end - 1, np.where(plan.sources == NONE, -1, plan.sources + end))
        sources[end + first] = found[plan.cells[first]]
        steps[image, 0], steps[image, 1] = np.minimum(plan.seen + step, NEVER), plan.sees + step
        positions[image] = offsets if coordinates.positions == "llamagen" else base + offsets
        cursor, end, base = stop + codes, image.stop, base + advance
        step += 1 + int(plan.sees.max())
    row_labels[:1] = IGNORE
    tensor = torch.from_numpy
    row = Row(tensor(row_ids), tensor(row_labels), tensor(positions), tensor(is_image), len(spans), merge.kind)
    row.condition, row.grids = sequence.condition, [grid for _, grid in spans]
    if sequence.features:
        row.is_read, row.features = tensor(is_read), torch.cat([segment.features for _, segment in sequence.features])
    if not prediction.is_raster:
        row.sources, row.steps = tensor(sources), tensor(steps)
    return row


def _images(
    grids: Sequence[Grid],
    prediction: Prediction,
    merge: Merge,
    coordinates: Coordinates,
    seed: int | list[int] | None,
    as_sampled: bool,
) -> list[_Image]:
    if seed is None:
        return [_image(grid, prediction, merge, coordinates) for grid in grids]
    seeds = seed if isinstance(seed, list) else np.random.default_rng(seed).integers(2**32, size=len(grids)).tolist()
    plan = prediction.plan if as_sampled else prediction.training_plan
    plans = [plan(merged_grid(grid, merge.side), own) for grid, own in zip(grids, seeds, strict=True)]
    return [_placed(plan, grid, merge, coordinates) for plan, grid in zip(plans, grids, strict=True)]


@lru_cache(maxsize=256)
def _image(grid: Grid, prediction: Prediction, merge: Merge, coordinates: Coordinates) -> _Image:
    return _placed(prediction.plan(merged_grid(grid, merge.side)), grid, merge, coordinates)


def _placed(plan: Plan, grid: Grid, merge: Merge, coordinates: Coordinates) -> _Image:
    offsets, advance = plan_offsets(plan, grid, merge.side, coordinates)
    index = cell_codes(grid, merge.side)
    return _Image(plan, index[plan.cells.clip(0)], offsets, advance, index.size)


def cell_codes(grid: Grid, side: int) -> np.ndarray:
    """``(n, s^2)``: which codes of a grid, counted row by row, belong to each of its n cells of s x s codes."""
    return windows(torch.arange(grid[0] * grid[1])[None], grid, side)[0].numpy()


def image_spans(ids: np.ndarray, grids: Sequence[Grid], vocabulary: Vocabulary) -> list[tuple[int, Grid]]:
    """First index and grid of every image span of a sequence.

    Raises:
        ValueError: if the runs of image codes do not match the grids one to one, a span has no ``<boi>`` before it, or an
            id is negative or beyond the codebook.
    """
    total = vocabulary.text_vocab_size + vocabulary.codebook_size
    if len(ids) and (ids.max() >= total or ids.min() < 0):
        outside = ids.max() if ids.max() >= total else ids.min()
        raise ValueError(f"input_ids: {outside} is not in [0, {total}), text vocabulary and codebook.")
    for grid in grids:
        if not isinstance(grid, tuple | list) or len(grid) != 2 or not all(map(is_whole, grid)):
            raise ValueError(f"image_grids: {grid!r} is not a grid (h, w) of whole numbers of at least 1.")
    is_image = np.zeros(len(ids) + 2, dtype=np.int8)
    is_image[1:-1] = ids >= vocabulary.text_vocab_size
    change = np.flatnonzero(np.diff(is_image)).tolist()
    starts, stops = change[::2], change[1::2]
    if len(starts) != len(grids):
        raise ValueError(f"image_grids: {len(grids)} grids for {len(starts)} image spans; give one (h, w) per span.")
    for start, stop, (height, width) in zip(starts, stops, grids, strict=True):
        if stop - start != height * width:
            raise ValueError(
                f"image_grids: the span at {start} has {stop - start} codes, its grid {height}x{width} needs {height * width}."
            )
        if start == 0 or ids[start - 1] != vocabulary.boi_token_id:
            raise ValueError(f"input_ids: the image span at {start} is not preceded by <boi>.")
    return [(start, (int(grid[0]), int(grid[1]))) for start, grid in zip(starts, grids, strict=True)]


def pack(rows: Iterable[Row], max_length: int) -> list[Row]:
    """Concatenate rows into rows of at most ``max_length`` positions with one document id each.

    The longest goes first, each into the fullest row that still has room for it (best-fit decreasing: at most 11/9 of the
    fewest rows possible, plus one). Inside a row the documents keep their order.

    Raises:
        ValueError: if a single row is longer than ``max_length``, or has a condition.
    """
    documents = list(rows)
    if any(document.condition is not None for document in documents):
        raise ValueError("condition: not possible in packed rows; leave data.pack out.")
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
    starts = np.cumsum([0, *map(len, documents)]).tolist()
    return Row(
        torch.cat([F.pad(d.input_ids, (0, columns - d.input_ids.shape[1]), value=IGNORE) for d in documents]),
        torch.cat([F.pad(d.labels, (0, columns - d.labels.shape[1]), value=IGNORE) for d in documents]),
        torch.cat([document.positions for document in documents]),
        torch.cat([document.is_image for document in documents]),
        sum(document.images for document in documents),
        _one_merge(documents),
        _joined(
            [None if d.sources is None else _shifted(d.sources, s) for d, s in zip(documents, starts, strict=False)]
        ),
        _joined([document.steps for document in documents]),
        torch.cat([torch.full((len(document),), number) for number, document in enumerate(documents)]),
        owners=[owner for document in documents for owner in document.owners],
        grids=[grid for document in documents for grid in document.grids],
        is_read=torch.cat([read_positions(document) for document in documents]),
        features=_joined([document.features for document in documents]),
    )


def read_positions(row: Row) -> Tensor:
    """``(S,)``, True where features enter a row."""
    return torch.zeros(len(row), dtype=torch.bool) if row.is_read is None else row.is_read


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    given = [part for part in parts if part is not None]
    return torch.cat(given) if given else None


def _shifted(sources: Tensor, start: int) -> Tensor:
    return torch.where(sources < 0, sources, sources + start)


def _one_merge(rows: Sequence[Row]) -> str:
    """How codes enter in all rows. Raises ValueError where a learned merge stands beside another one."""
    kinds = {row.merge for row in rows if row.images}
    if "channel" in kinds and len(kinds) > 1:
        raise ValueError(f"rows: merges {sorted(kinds)} cannot stand in one batch.")
    return "channel" if "channel" in kinds else "mean"


def collate(rows: Sequence[Row], config: UnifiedConfig, multiple: int = 1) -> Batch:
    """Pad rows on the right into a batch, and count it.

    A text position weighs ``text_loss_weight``, an image position ``image_loss_weight``, times the number of its codes if
    ``loss_normalization`` is ``token``.

    Args:
        rows: of :func:`arrange` or :func:`pack`; different merges may stand side by side.
        config: of the model.
        multiple: the length of a row and of every list of indices is padded to a multiple of it, so that a compiler meets
            few shapes.

    Returns:
        ``input_ids`` and ``labels`` of shape ``(B, S)``, or ``(B, S, P)`` where windows enter; ``positions (B, S, 2)``; flat
        indices into ``B * S``: ``image_inputs``, the positions that codes enter, ``text_targets`` and ``image_targets``, the
        supervised ones (B * S stands for none). Unless codes come in raster order: ``image_sources (N, m)``, what predicts
        each of ``image_targets``; ``query_inputs``, flat indices of queries; ``steps (B, S, 2)``. ``document_ids (B, S)`` (-1
        on padding) if the rows are packed. ``merge`` if it is a learned one. ``condition (B,)`` of a class-conditional model.
        ``features (n, F)`` of the images that are read, if there are any, and ``feature_inputs``, where they enter.

    Raises:
        ValueError: if some rows are packed, or have a condition, and others not, or a learned merge stands beside another one.
    """
    longest, vocabulary = max(map(len, rows)), config.vocabulary
    length, columns = longest + -longest % multiple, max(row.input_ids.shape[1] for row in rows)
    input_ids, labels = (torch.full((len(rows), length, columns), IGNORE) for _ in range(2))
    input_ids[..., 0] = vocabulary.pad_token_id
    positions, is_image = torch.zeros(len(rows), length, 2), torch.zeros(len(rows), length, dtype=torch.bool)
    for number, row in enumerate(rows):
        size, taken = row.input_ids.shape
        input_ids[number, :size, :taken], labels[number, :size, :taken] = row.input_ids, row.labels
        positions[number, :size], is_image[number, :size] = row.positions, row.is_image
    supervised, of_image = labels != IGNORE, labels[..., 0] >= vocabulary.text_vocab_size
    queries = is_image & (input_ids[..., 0] == IGNORE)
    marks = {
        "image_inputs": is_image & ~queries,
        "text_targets": supervised[..., 0] & ~of_image,
        "image_targets": of_image,
    }
    found = {name: mark.flatten().nonzero().flatten() for name, mark in marks.items()}
    texts, images = len(found["text_targets"]), len(found["image_targets"])
    codes = int(supervised[of_image].sum()) if config.loss_normalization == "token" else images
    weight = config.text_loss_weight * texts + config.image_loss_weight * codes
    counts = Counts(sum(row.images for row in rows), sum(map(len, rows)), texts, images, weight)
    inputs: dict[str, Any] = {
        "input_ids": input_ids if columns > 1 else input_ids[..., 0],
        "labels": labels if columns > 1 else labels[..., 0],
        "positions": positions,
        **{name: F.pad(index, (0, -len(index) % multiple), value=is_image.numel()) for name, index in found.items()},
    }
    if _one_merge(rows) == "channel":
        inputs["merge"] = "channel"
    if any(row.steps is not None for row in rows):
        inputs |= _order_inputs(rows, length, found["image_targets"], queries, multiple)
    features = _joined([row.features for row in rows])
    if features is not None:
        read = torch.stack([F.pad(read_positions(row), (0, length - len(row))) for row in rows])
        places, missing = read.flatten().nonzero().flatten(), -len(features) % multiple
        inputs["feature_inputs"] = F.pad(places, (0, missing), value=is_image.numel())
        inputs["features"] = F.pad(features, (0, 0, 0, missing))
    conditions = [row.condition for row in rows if row.condition is not None]
    if conditions:
        if len(conditions) != len(rows):
            raise ValueError(
                f"rows: {len(conditions)} of {len(rows)} have a condition; give one to all of them or none."
            )
        inputs["condition"] = torch.tensor(conditions)
    packed = [row.document_ids for row in rows if row.document_ids is not None]
    if packed:
        if len(packed) != len(rows):
            raise ValueError(f"rows: {len(packed)} of {len(rows)} are packed; pack all of them or none.")
        inputs["document_ids"] = torch.stack([F.pad(ids, (0, length - len(ids)), value=-1) for ids in packed])
    owners = torch.tensor([owner for row in rows for owner in row.owners], dtype=torch.int64)
    grids = torch.tensor([grid for row in rows for grid in row.grids], dtype=torch.int64).view(-1, 2)
    return Batch(inputs, counts, owners, grids)


def _order_inputs(
    rows: Sequence[Row], length: int, targets: Tensor, queries: Tensor, multiple: int
) -> dict[str, Tensor]:
    """What a batch holds beside the inputs of raster order; see :func:`collate`."""
    none = len(rows) * length
    sources, steps = [], []
    for number, row in enumerate(rows):
        if row.sources is None or row.steps is None:
            raise ValueError("rows: raster order cannot stand beside another order in one batch.")
        missing, flat = length - len(row), row.sources + number * length
        sources.append(F.pad(torch.where(row.sources < 0, none, flat), (0, 0, 0, missing), value=none))
        steps.append(F.pad(row.steps, (0, 0, 0, missing), value=NEVER))
    inputs = {
        "steps": torch.stack(steps),
        "image_sources": F.pad(torch.cat(sources)[targets], (0, 0, 0, -len(targets) % multiple), value=none),
    }
    asking = queries.flatten().nonzero().flatten()
    if len(asking):
        inputs["query_inputs"] = F.pad(asking, (0, -len(asking) % multiple), value=none)
    return inputs
