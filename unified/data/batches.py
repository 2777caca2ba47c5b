"""Training batches as a pure function of their index, so that a resumed run sees exactly what it would have seen."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from unified.config import UnifiedConfig
from unified.prediction.arrange import Batch, arrange, collate, pack
from unified.prediction.merge import Merge
from unified.prediction.plan import Prediction
from unified.sequence import TokenSequence
from unified_tokenizers.fields import is_finite

BLOCK = 1000
_MIX, _SHUFFLE, _CHOICE, _ORDER, _VIEW, _FURTHER = 10, 11, 12, 13, 14, 15  # independent random streams of one seed
Further = Callable[[Sequence[TokenSequence], np.random.Generator], list[TokenSequence] | None]


@dataclass
class Source:
    """Rows, and how one of them becomes a sequence; the generator is for random choices, new in every epoch.

    Attributes:
        name: for messages.
        rows: of any kind.
        sequence: from a row and a generator to a sequence.
        weight: share of the rows, relative to the weights of other sources.
        images: where the views of each image begin, and behind the last one the number of rows; an epoch has one view of every
            image then, chosen at random. None: every row is an image.
    """

    name: str
    rows: datasets.Dataset
    sequence: Callable[[dict[str, Any], np.random.Generator], TokenSequence]
    weight: float = 1.0
    images: np.ndarray | None = None

    @property
    def epoch(self) -> int:
        """Sequences of an epoch."""
        return len(self.rows) if self.images is None else len(self.images) - 1


class Batches(Dataset):
    """Item i is the i-th batch of this process. Processes take interleaved slices of one global batch.

    Sequences are numbered through all batches and processes, and every block of 1000 numbers holds the sources' shares
    exactly (rounded to thousandths), shuffled. The n-th sequence of a source is row ``n mod rows`` of its epoch
    ``n // rows``, each epoch a new permutation: every row, or a view of every image, once before any comes again. Random
    choices of a sequence depend on the seed and its number alone, so that resuming, gradient accumulation and the number of
    processes change nothing.

    Args:
        sources: one or more.
        config: of the model.
        batch_size: sequences of a batch on each process.
        num_batches: length.
        seed, rank, world_size: of the run and of this process.
        pack_length: put the sequences of a batch together into rows (see :func:`make_batch`).
        bucket: batches of one code grid each, for a single source of captioned images (see :func:`bucketed_order`).
        merge_of: how codes are merged in batch i; None, as the default, for the model's own way.
        further: functions by name, each from the sequences of a batch and a generator to further ones, one for each, or to
            None: ``Batch.further`` holds what is arranged of them.

    Raises:
        ValueError: if a source has no rows, or ``bucket`` is set for several sources.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        config: UnifiedConfig,
        batch_size: int,
        num_batches: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pack_length: int | None = None,
        bucket: bool = False,
        merge_of: Callable[[int], Merge | None] | None = None,
        further: Mapping[str, Further] | None = None,
    ):
        for source in sources:
            if len(source.rows) == 0:
                raise ValueError(f"data: {source.name} has no row to train on.")
        if bucket and any(source.images is not None for source in sources):
            raise ValueError("data.bucket: not possible with data.one_view; leave one of them out.")
        if bucket and len(sources) > 1:
            raise ValueError(
                "data.bucket: batches of several sources hold several lengths anyway; use data.pack instead."
            )
        self.sources, self.config, self.batch_size, self.num_batches = list(sources), config, batch_size, num_batches
        self.seed, self.rank, self.world_size, self.pack_length = seed, rank, world_size, pack_length
        self.merge_of, self.further = merge_of, dict(further or {})
        self.shares = block_shares([source.weight for source in sources])
        rows = self.sources[0].rows
        self._grids = np.stack([rows["height"], rows["width"]], axis=1) if bucket else None
        self._block: tuple[int, np.ndarray, np.ndarray] | None = None
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < self.num_batches:
            raise IndexError(index)
        merge = None if self.merge_of is None else self.merge_of(index)
        sequences, further = self.sequences(index), dict[str, Batch]()
        for name, make in self.further.items():
            made = make(sequences, np.random.default_rng((self.seed, _FURTHER, index, self.rank)))
            if made is not None:
                further[name] = make_batch(made, self.config, merge, self.pack_length)
        return make_batch(sequences, self.config, merge, self.pack_length)._replace(further=further)

    def sequences(self, index: int) -> list[TokenSequence]:
        """The ``batch_size`` sequences of batch ``index`` on this process."""
        total = self.batch_size * self.world_size
        numbers = range(index * total + self.rank, (index + 1) * total, self.world_size)
        places = [self.place(number) for number in numbers]
        rows: dict[tuple[int, int], dict[str, Any]] = {}
        for source in {source for source, _ in places}:  # rows of one source are read together
            wanted = sorted({row for owner, row in places if owner == source})
            columns = self.sources[source].rows[wanted]
            rows |= {(source, row): {n: column[k] for n, column in columns.items()} for k, row in enumerate(wanted)}
        generators = [np.random.default_rng((self.seed, _CHOICE, number)) for number in numbers]
        made = [
            self.sources[place[0]].sequence(rows[place], rng) for place, rng in zip(places, generators, strict=True)
        ]
        any_order = Prediction.of(self.config).way.any_order  # others have one permutation for all
        for number, sequence in zip(numbers, made, strict=True) if any_order else ():
            sequence.seed = int(np.random.default_rng((self.seed, _ORDER, number)).integers(2**62))
        return made

    def place(self, number: int) -> tuple[int, int]:
        """Source and row of sequence ``number``."""
        block, offset = divmod(number, BLOCK)
        if self._block is None or self._block[0] != block:
            owners = np.repeat(np.arange(len(self.shares)), self.shares)
            owners = np.random.default_rng((self.seed, _MIX, block)).permutation(owners)
            ranks = np.empty(BLOCK, dtype=int)  # of each sequence among those of its source in the block
            for source, share in enumerate(self.shares):
                ranks[owners == source] = np.arange(share)
            self._block = (block, owners, ranks)
        source = int(self._block[1][offset])
        own = block * self.shares[source] + int(self._block[2][offset])
        rows = self.sources[source].epoch
        epoch, position = divmod(own, rows)
        if source not in self._orders or self._orders[source][0] != epoch:
            rng = np.random.default_rng((self.seed, _SHUFFLE, source, epoch))
            if self._grids is None:
                order = rng.permutation(rows)
            else:
                total = self.batch_size * self.world_size
                order = bucketed_order(self._grids, total, -epoch * rows % total, rng)
            self._orders[source] = (epoch, order)
        place, images = int(self._orders[source][1][position]), self.sources[source].images
        if images is None:
            return source, place
        view = np.random.default_rng((self.seed, _VIEW, number))
        return source, int(view.integers(images[place], images[place + 1]))


def first_views(rows: datasets.Dataset) -> np.ndarray:
    """``(N + 1,)``: where the views of each of N images begin in rows of a codes cache, and behind the last the number of rows.

    Raises:
        ValueError: if the rows do not say which image they are of.
    """
    missing = [name for name in ("source_row", "view") if name not in rows.column_names]
    if missing:
        raise ValueError(f"data.one_view: the codes have no column {missing[0]!r}; encode the images again.")
    numbers = rows.select_columns("source_row").with_format("numpy")[:]["source_row"]
    return np.concatenate([[0], 1 + np.flatnonzero(np.diff(numbers)), [len(numbers)]])


def make_batch(
    sequences: Sequence[TokenSequence],
    config: UnifiedConfig,
    merge: Merge | None = None,
    pack_length: int | None = None,
    as_sampled: bool = False,
) -> Batch:
    """Arrange sequences, pack them if a length is given, and put them side by side.

    ``merge`` is how codes enter in an earlier stage of training; None for the model's own way. ``as_sampled`` is that of
    :func:`unified.prediction.arrange.arrange`.

    Rows are packed to ``pack_length`` codes: windows of s x s codes take rows of ``pack_length / s^2`` positions (or of the
    longest sequence), because the cost of attention grows with their square.

    Raises:
        ValueError: if a sequence does not fit into a packed row, and as :func:`unified.prediction.arrange.arrange`.
    """
    if not sequences:
        raise ValueError("sequences: empty; a batch needs one or more.")
    vocabulary, coordinates, prediction = config.vocabulary, config.coordinates, Prediction.of(config)
    rows = [arrange(sequence, vocabulary, coordinates, prediction, merge, as_sampled) for sequence in sequences]
    for number, row in enumerate(rows):
        row.owners = [number] * row.images
    if pack_length is not None:
        longest = max(map(len, rows))
        if longest > pack_length:
            raise ValueError(f"data.pack: {pack_length} is shorter than a sequence of {longest} tokens; raise it.")
        rows = pack(rows, max(longest, pack_length // (merge or prediction.merge).side ** 2))
    return collate(rows, config)


def in_order(source: Source, config: UnifiedConfig, batch_size: int) -> Iterator[Batch]:
    """Every row once and in order, images as they are sampled; the last batch may be smaller."""
    rng = np.random.default_rng(0)
    for start in range(0, len(source.rows), batch_size):
        rows = range(start, min(start + batch_size, len(source.rows)))
        sequences = [source.sequence(source.rows[row], rng) for row in rows]
        for row, sequence in zip(rows, sequences, strict=True):
            sequence.seed = row
        yield make_batch(sequences, config, as_sampled=True)


def block_shares(weights: Sequence[float]) -> list[int]:
    """Weights as whole numbers that sum to 1000, by largest remainders.

    Raises:
        ValueError: if there is none, a weight is not above 0, or less than half a thousandth of the sum.
    """
    if not weights:
        raise ValueError("data.sources: empty; name one or more.")
    for weight in weights:
        if not is_finite(weight) or weight <= 0:
            raise ValueError(
                f"data.sources: weight {weight!r} must be above 0; leave out a source that is not to be used."
            )
    exact = np.asarray(weights) / sum(weights) * BLOCK
    shares = np.floor(exact).astype(int)
    rest = np.argsort(shares - exact, kind="stable")[: BLOCK - shares.sum()]
    shares[rest] += 1
    if shares.min() == 0:
        raise ValueError(
            f"data.sources: weight {weights[int(shares.argmin())]} is below 1/{BLOCK} of their sum; raise it."
        )
    return [int(share) for share in shares]


def bucketed_order(grids: np.ndarray, batch_size: int, begun: int, rng: np.random.Generator) -> np.ndarray:
    """An epoch's order of rows in which batches hold one grid each, in random order; leftovers share mixed batches.

    Args:
        grids: height and width of every row, ``(N, 2)``.
        batch_size: rows of a global batch.
        begun: rows that the last batch of the epoch before still needs; leftovers fill it, and begin the last one here.
        rng: source of randomness.

    Returns:
        A permutation of the N rows.
    """
    shuffled = rng.permutation(len(grids))
    _, bucket = np.unique(grids[shuffled], axis=0, return_inverse=True)
    batches, leftovers = [], []
    for name in range(bucket.max() + 1):
        rows = shuffled[bucket.reshape(-1) == name]
        whole = len(rows) // batch_size * batch_size
        batches += list(rows[:whole].reshape(-1, batch_size))
        leftovers.append(rows[whole:])
    rest = rng.permutation(np.concatenate(leftovers))
    rng.shuffle(batches)
    begun = min(begun, len(grids))
    ending = (len(grids) - begun) % batch_size
    while len(rest) < begun + ending:  # a batch gives its rows to the two ends
        rest = np.concatenate([rest, batches.pop()])
    batches += list(rest[begun + ending :].reshape(-1, batch_size))
    rng.shuffle(batches)
    return np.concatenate([rest[:begun], *batches, rest[begun : begun + ending]])


def loader(batches: Batches, start: int = 0, num_workers: int = 0, pin_memory: bool = False) -> DataLoader:
    """Iterate over batches from index ``start`` on. The global random stream, which dropout uses, is left alone.

    ``pin_memory`` puts them into memory that a GPU copies from while it computes.
    """
    indices, generator = range(start, len(batches)), torch.Generator()
    return DataLoader(
        batches, None, sampler=indices, num_workers=num_workers, pin_memory=pin_memory, generator=generator
    )
