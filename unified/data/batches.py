"""Training batches as a pure function of the step, so that a resumed run sees exactly what it would have seen."""

from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from unified.config import Vocabulary
from unified.sequence import ImageSegment, TextSegment, TokenSequence, build_sequence, collate, pack
from unified_tokenizers import TextTokenizer

_SHUFFLE, _DROPOUT, _NOISE, _DIRECTION = 0, 1, 2, 3  # independent random streams of one seed
Batch = dict[str, torch.Tensor]


class Batches(Dataset):
    """Item i is the i-th batch of this process. Processes take interleaved slices of one global batch."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        batch_size: int,
        num_batches: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pack_length: int | None = None,
    ):
        self.vocabulary, self.batch_size, self.num_batches, self.seed = vocabulary, batch_size, num_batches, seed
        self.rank, self.world_size, self.pack_length = rank, world_size, pack_length

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < self.num_batches:
            raise IndexError(index)
        sequences = self.sequences(index)
        if self.pack_length is not None:
            longest = max(len(sequence.input_ids) for sequence in sequences)
            if longest > self.pack_length:
                raise ValueError(
                    f"data.pack: {self.pack_length} is shorter than a sequence of {longest} tokens; raise it."
                )
            sequences = pack(sequences, self.pack_length)
        return collate(sequences, self.vocabulary)

    def sequences(self, index: int) -> list[TokenSequence]:
        """The ``batch_size`` sequences of batch ``index``."""
        raise NotImplementedError


class CaptionedBatches(Batches):
    """Captions and codes laid out as ``<bos> caption <boi> codes <eoi>``.

    For a share ``captioning`` of the rows the image comes first and the caption is learned instead:
    ``<bos> <boi> codes <eoi> caption <eos>``. Every epoch is a new permutation of the rows; batches run across its end,
    so no row is dropped. With ``bucket`` the global batches of an epoch hold rows of one grid each (see
    :func:`bucketed_order`).
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        text_tokenizer: TextTokenizer,
        vocabulary: Vocabulary,
        batch_size: int,
        num_batches: int,
        seed: int = 0,
        caption_dropout: float = 0.0,
        code_noise: float = 0.0,
        train_on_captions: bool = False,
        captioning: float = 0.0,
        rank: int = 0,
        world_size: int = 1,
        pack_length: int | None = None,
        bucket: bool = False,
    ):
        if len(rows) == 0:
            raise ValueError("data.train: no rows to train on.")
        super().__init__(vocabulary, batch_size, num_batches, seed, rank, world_size, pack_length)
        self.rows, self.text_tokenizer = rows, text_tokenizer
        self.caption_dropout, self.code_noise, self.train_on_captions = caption_dropout, code_noise, train_on_captions
        self.captioning = captioning
        self._grids = np.stack([rows["height"], rows["width"]], axis=1) if bucket else None
        self._epoch: tuple[int, np.ndarray] | None = None

    def sequences(self, index: int) -> list[TokenSequence]:
        """This process's share of the global batch ``index``."""
        total = self.batch_size * self.world_size
        dropped = np.random.default_rng((self.seed, _DROPOUT, index)).random(total) < self.caption_dropout
        captioned = np.random.default_rng((self.seed, _DIRECTION, index)).random(total) < self.captioning
        mine = range(self.rank, total, self.world_size)
        rows = self.rows[[self._row(index * total + i) for i in mine]]
        sequences = [self._sequence(rows, k, bool(dropped[i]), bool(captioned[i])) for k, i in enumerate(mine)]
        if self.code_noise:
            for sequence, i in zip(sequences, mine, strict=True):
                rng = np.random.default_rng((self.seed, _NOISE, index * total + i))
                add_code_noise(sequence, self.vocabulary, self.code_noise, rng)
        return sequences

    def once(self, captioned: bool = False) -> Iterator[Batch]:
        """Every row once and in order, without dropout or noise; the last batch may be smaller."""
        for start in range(0, len(self.rows), self.batch_size):
            rows = self.rows[start : start + self.batch_size]
            yield collate(
                [self._sequence(rows, k, False, captioned) for k in range(len(rows["caption"]))], self.vocabulary
            )

    def _row(self, position: int) -> int:
        """Row at ``position`` of the endless stream of shuffled epochs."""
        epoch, offset = divmod(position, len(self.rows))
        if self._epoch is None or self._epoch[0] != epoch:
            rng = np.random.default_rng((self.seed, _SHUFFLE, epoch))
            if self._grids is None:
                order = rng.permutation(len(self.rows))
            else:
                total = self.batch_size * self.world_size
                order = bucketed_order(self._grids, total, -epoch * len(self.rows) % total, rng)
            self._epoch = (epoch, order)
        return int(self._epoch[1][offset])

    def _sequence(self, rows: dict[str, Any], k: int, dropped: bool, captioned: bool) -> TokenSequence:
        row = {name: rows[name][k] for name in ("caption", "codes", "height", "width")}
        return captioned_sequence(row, self.text_tokenizer, self.vocabulary, dropped, captioned, self.train_on_captions)


def bucketed_order(grids: np.ndarray, batch_size: int, begun: int, rng: np.random.Generator) -> np.ndarray:
    """An epoch's order of rows in which batches hold one grid each, in random order; leftovers share mixed batches.

    Args:
        grids: height and width of every row, ``(N, 2)``.
        batch_size: rows of a global batch.
        begun: rows that the last batch of the epoch before still wants; leftovers fill it, and begin the last one here.
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


def captioned_sequence(
    row: dict[str, Any],
    text_tokenizer: TextTokenizer,
    vocabulary: Vocabulary,
    dropped: bool = False,
    captioned: bool = False,
    train_on_captions: bool = False,
) -> TokenSequence:
    """A row of a codes cache as caption and image, or as image and caption if it is to be ``captioned``."""
    caption = text_tokenizer.encode(str(row["caption"]))
    image = to_grid(row["codes"], row["height"], row["width"])
    if captioned:
        return build_sequence([ImageSegment(image, loss=False), TextSegment(caption)], vocabulary, end=True)
    text = TextSegment([] if dropped else caption, loss=train_on_captions)
    return build_sequence([text, ImageSegment(image)], vocabulary)


def to_grid(codes: Sequence[int] | np.ndarray, height: int, width: int) -> torch.Tensor:
    """Flat codes as ``(height, width)``."""
    return torch.tensor(np.asarray(codes), dtype=torch.int64).reshape(int(height), int(width))


def add_code_noise(sequence: TokenSequence, vocabulary: Vocabulary, limit: float, rng: np.random.Generator) -> None:
    """Replace input codes at random, at a rate sampled from [0, ``limit``]; the labels stay. A small set of images can be
    told apart by their first codes alone: noise makes the model look at the caption, and forgives its own slips when it
    draws.
    """
    is_code = (sequence.input_ids >= vocabulary.text_vocab_size).numpy()
    replaced = is_code & (rng.random(len(is_code)) < rng.uniform(0, limit))
    codes = rng.integers(vocabulary.codebook_size, size=int(replaced.sum())) + vocabulary.text_vocab_size
    sequence.input_ids[torch.from_numpy(replaced)] = torch.from_numpy(codes)


def loader(batches: Batches, start: int = 0, num_workers: int = 0) -> DataLoader:
    """Iterate over batches from index ``start`` on. The global random stream, which dropout samples from, is left alone."""
    indices, generator = range(start, len(batches)), torch.Generator()
    return DataLoader(batches, batch_size=None, sampler=indices, num_workers=num_workers, generator=generator)
